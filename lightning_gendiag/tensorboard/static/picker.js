// A list of runs that opens from a button, with the state of each run as a badge.

import {counted, el, freshId} from './dom.js';

const SIGNS = {healthy: '●', unhealthy: '▲', 'getting worse': '◆', 'not judged': '○'};
const LONG = 8;

export function badge(state, attributes = {}) {
  const known = state in SIGNS ? state : 'not judged';
  return el('span', {class: 'badge', 'data-state': known, ...attributes}, `${SIGNS[known]} ${state}`);
}

export class Picker {
  /** `kind` is part of the test ids; `picked(run)` gets a name, or null for the entry `none`. */
  constructor({kind, label, none = null, picked}) {
    const id = freshId();
    Object.assign(this, {kind, none, picked});
    this.button = el('button', {
      type: 'button',
      class: 'picker-button',
      'aria-haspopup': 'listbox',
      'aria-expanded': 'false',
      'aria-controls': id,
      'data-testid': `${kind}-picker`,
      onclick: () => this.toggle(),
      onkeydown: (event) => event.key === 'ArrowDown' && (event.preventDefault(), this.toggle(true)),
    });
    this.filter = el('input', {
      type: 'search',
      placeholder: 'filter',
      'aria-label': 'Filter the runs',
      oninput: () => this.fill(),
    });
    this.list = el('div', {role: 'listbox', 'aria-label': label, id});
    this.popup = el(
      'div',
      {class: 'popup', hidden: true, onkeydown: (event) => this.key(event)},
      this.filter,
      this.list,
    );
    this.element = el('div', {class: 'picker'}, el('span', {class: 'faint'}, label), this.button, this.popup);
    document.addEventListener('pointerdown', (event) => !this.element.contains(event.target) && this.toggle(false));
    this.element.addEventListener(
      'focusout',
      (event) => event.relatedTarget && !this.element.contains(event.relatedTarget) && this.toggle(false),
    );
  }

  show(runs, chosen) {
    Object.assign(this, {runs, chosen});
    const run = runs.find((one) => one.run === chosen);
    this.button.replaceChildren(
      el('span', {class: 'run-name'}, chosen ?? this.none ?? 'no run'),
      ...(run ? [badge(run.state)] : []),
      el('span', {'aria-hidden': 'true'}, '▾'),
    );
    this.button.title = chosen ?? '';
    if (!this.popup.hidden) this.fill();
  }

  toggle(isOpen = this.popup.hidden) {
    if (isOpen === !this.popup.hidden) return;
    this.popup.hidden = !isOpen;
    this.button.setAttribute('aria-expanded', String(isOpen));
    if (!isOpen) return;
    this.filter.hidden = this.runs.length <= LONG;
    this.filter.value = '';
    this.fill();
    (this.list.querySelector('[aria-selected=true]') ?? this.list.firstChild)?.focus();
  }

  fill() {
    const wanted = this.filter.value.toLowerCase();
    const runs = this.runs.filter((one) => one.run.toLowerCase().includes(wanted));
    const focused = document.activeElement?.dataset?.run;
    this.list.replaceChildren(
      ...(this.none ? [this.option(null, this.none)] : []),
      ...runs.map((run) =>
        this.option(
          run.run,
          run.run,
          badge(run.state),
          el('span', {class: 'faint'}, `${counted(run.alarms ?? 0, 'open alarm')}, step ${run.step ?? 0}`),
        ),
      ),
    );
    if (focused != null) [...this.list.children].find((one) => one.dataset.run === focused)?.focus();
  }

  option(run, name, ...more) {
    return el(
      'div',
      {
        role: 'option',
        tabindex: -1,
        class: 'option',
        'aria-selected': String(run === this.chosen),
        'data-testid': `${this.kind}-option`,
        'data-run': run ?? '',
        onclick: () => this.pick(run),
      },
      el('span', {class: 'run-name'}, name),
      ...more,
    );
  }

  pick(run) {
    this.toggle(false);
    this.button.focus();
    this.picked(run);
  }

  key(event) {
    const options = [...this.list.children];
    const at = options.indexOf(document.activeElement);
    const moves = {ArrowDown: at + 1, ArrowUp: Math.max(0, at - 1), Home: 0, End: options.length - 1};
    event.stopPropagation();
    if (event.key === 'Escape') {
      this.toggle(false);
      this.button.focus();
    } else if ((event.key === 'Enter' || event.key === ' ') && at >= 0) {
      event.preventDefault();
      options[at].click();
    } else if (event.key in moves && (at >= 0 || event.key === 'ArrowDown')) {
      event.preventDefault();
      options[Math.min(options.length - 1, moves[event.key])]?.focus();
    }
  }
}
