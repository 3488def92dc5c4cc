// What is wrong in words: the state of the run, and its alarms.

import {colourOf} from './colours.js';
import {counted, el} from './dom.js';
import {linked} from './panel.js';
import {badge} from './picker.js';
import {alarms, beganAt, chooseAlarm, currentStep, namesOf, point, state} from './state.js';

const NO_REPORT = 'This run has no report. A report is written where CollapseStopping is attached to the trainer.';

export class Report {
  constructor() {
    this.state = el('div', {class: 'state'});
    this.summary = el('p', {class: 'summary', 'data-testid': 'summary'});
    this.more = el('button', {type: 'button', class: 'link', onclick: () => this.expand()}, 'whole report');
    this.checkpoint = el('span', {class: 'faint'});
    this.title = el('h2');
    this.list = el('ol', {class: 'alarms', 'data-testid': 'alarms'});
    this.none = el('p', {class: 'faint'});
    this.element = el(
      'div',
      {class: 'report'},
      el('section', {class: 'verdict', 'aria-label': 'Report'}, this.state, this.summary, this.more),
      el('section', {'aria-label': 'Alarms'}, this.title, this.list, this.none),
    );
  }

  draw() {
    const report = state.data?.report;
    const word = report?.state ?? 'not judged';
    const evaluations = Math.max(0, ...Object.values(state.data?.monitors ?? {}).map((one) => one.evaluations ?? 0));
    this.state.replaceChildren(
      badge(word, {'data-testid': 'state-badge'}),
      el('span', {class: 'faint'}, evaluations ? counted(evaluations, 'evaluation') : ''),
      this.checkpoint,
    );
    this.summary.textContent = report?.summary || NO_REPORT;
    const checkpoint = report?.last_good_checkpoint;
    this.checkpoint.textContent = checkpoint ? `last good checkpoint: ${checkpoint}` : '';
    const all = [...alarms()].sort((a, b) => (a.recovered != null) - (b.recovered != null) || b.step - a.step);
    const open = all.filter((one) => one.recovered == null).length;
    this.title.textContent = all.length
      ? `${counted(open, 'open alarm')}${all.length > open ? `, ${all.length - open} recovered` : ''}`
      : 'Alarms';
    this.none.textContent = all.length ? '' : report ? 'There is no alarm.' : '';
    this.items = all.map((alarm) => this.item(alarm));
    this.list.replaceChildren(...this.items.map((one) => one.element));
    this.move();
    this.mark();
    this.more.hidden = this.summary.scrollHeight <= this.summary.clientHeight + 2 && !this.isWhole;
  }

  expand() {
    this.isWhole = this.summary.classList.toggle('whole');
    this.more.textContent = this.isWhole ? 'less' : 'whole report';
  }

  item(alarm) {
    const monitor = state.data.monitors[alarm.diagnostic];
    const series = monitor?.series.find((one) => one.name === namesOf(alarm)[0]);
    const isOver = alarm.recovered != null;
    const button = el(
      'button',
      {
        type: 'button',
        class: `alarm${isOver ? ' recovered' : ''}`,
        'data-testid': 'alarm',
        'data-step': alarm.step,
        style: `border-left-color:${colourOf(series?.place)}`,
        onclick: () => chooseAlarm(alarm),
        onpointerenter: () => point(namesOf(alarm)),
        onpointerleave: () => point([]),
      },
      el(
        'span',
        {class: 'alarm-head'},
        el('b', {}, alarm.label ?? namesOf(alarm).join(', ')),
        el('span', {}, `step ${alarm.step}`),
        el(
          'span',
          {class: 'faint'},
          [
            alarm.diagnostic,
            alarm.is_critical ? 'critical' : null,
            isOver ? `recovered at step ${alarm.recovered}` : null,
          ]
            .filter(Boolean)
            .join(', '),
        ),
      ),
      el('span', {class: 'message'}, alarm.message ?? ''),
    );
    return {alarm, button, element: el('li', {}, button, this.alsoChanged(alarm))};
  }

  /** Series that changed at the same time; each leads to its own curve. */
  alsoChanged(alarm) {
    const others = alarm.also_changed ?? [];
    if (!others.length) return null;
    const nameOf = (text) => text.slice(text.indexOf(': ') + 2);
    return el(
      'span',
      {class: 'also'},
      'also changed: ',
      ...others.slice(0, 6).map((text) => linked(el('button', {type: 'button', class: 'link'}, text), [nameOf(text)])),
      others.length > 6 ? `and ${others.length - 6} more` : null,
    );
  }

  move() {
    for (const {alarm, button} of this.items) {
      const step = currentStep();
      button.classList.toggle('later', step < beganAt(alarm));
    }
  }

  mark() {
    for (const {alarm, button} of this.items) button.setAttribute('aria-current', String(state.alarm === alarm));
  }
}
