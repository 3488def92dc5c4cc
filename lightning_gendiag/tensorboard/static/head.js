// The bar that stays in view: pickers of runs, play, the step slider.

import {counted, el, freshId} from './dom.js';
import {Picker} from './picker.js';
import {currentStep, epochAt, on, setPosition, state} from './state.js';

const PLAY_DELAY = 180;

export class Head {
  constructor({pickRun, pickCompare}) {
    this.runs = new Picker({kind: 'run', label: 'run', picked: pickRun});
    this.compare = new Picker({kind: 'compare', label: 'compare with', none: 'no other run', picked: pickCompare});
    this.play = el('button', {
      type: 'button',
      class: 'play',
      'data-testid': 'play',
      onclick: () => this.setPlaying(!state.playing),
    });
    this.slider = el('input', {
      type: 'range',
      min: 0,
      max: 0,
      value: 0,
      'aria-label': 'Step',
      'data-testid': 'step-slider',
      oninput: () => this.slide(),
    });
    this.label = el('output', {class: 'step-label', 'data-testid': 'step-label'});
    const follow = freshId();
    this.follow = el('input', {
      type: 'checkbox',
      id: follow,
      'data-testid': 'follow',
      onchange: () => this.setFollow(this.follow.checked),
    });
    this.element = el(
      'div',
      {class: 'head', role: 'toolbar', 'aria-label': 'Run and step'},
      this.runs.element,
      this.compare.element,
      el(
        'div',
        {class: 'transport'},
        this.play,
        this.slider,
        this.label,
        el(
          'label',
          {for: follow, title: 'Stay at the newest evaluation while the run goes on'},
          this.follow,
          'follow newest',
        ),
      ),
    );
    on('runs', () => this.showRuns());
    on('compare', () => this.showRuns());
    on('run', () => {
      this.showRuns();
      this.showStep();
    });
    on('step', () => this.showStep());
    this.setPlaying(false);
  }

  showRuns() {
    this.runs.show(state.runs, state.run);
    this.compare.show(
      state.runs.filter((one) => one.run !== state.run),
      state.compare,
    );
  }

  showStep() {
    const last = Math.max(0, state.steps.length - 1);
    this.slider.max = last;
    this.slider.value = state.position;
    this.slider.disabled = last === 0;
    const epoch = epochAt(currentStep());
    this.slider.setAttribute('aria-valuetext', `step ${currentStep()}`);
    this.label.replaceChildren(
      el('b', {}, `step ${currentStep()}`),
      el('span', {class: 'faint'}, ` of ${state.steps[last] ?? 0}${epoch == null ? '' : `, epoch ${epoch}`}`),
    );
    this.label.title = counted(state.steps.length, 'step');
    this.follow.checked = state.follow;
  }

  slide() {
    this.setPlaying(false);
    setPosition(Number(this.slider.value));
  }

  setFollow(isOn) {
    if (isOn) setPosition(state.steps.length - 1);
    state.follow = isOn;
  }

  setPlaying(isOn) {
    clearInterval(this.timer);
    state.playing = isOn;
    this.play.replaceChildren(el('span', {'aria-hidden': 'true'}, isOn ? '❚❚' : '▶'));
    this.play.setAttribute('aria-label', isOn ? 'Pause' : 'Play');
    this.play.title = isOn ? 'Pause (space)' : 'Play (space)';
    if (!isOn) return;
    if (state.position >= state.steps.length - 1) setPosition(0);
    this.timer = setInterval(() => this.tick(), PLAY_DELAY);
  }

  tick() {
    if (state.position >= state.steps.length - 1) this.setPlaying(false);
    else setPosition(state.position + 1);
  }

  /** Arrow keys move by evaluation, space plays, home and end jump, unless the focus is where the key means something. */
  key(event) {
    const {target} = event;
    if (
      event.ctrlKey ||
      event.metaKey ||
      event.altKey ||
      target.closest?.('select, [role=listbox], input[type=radio], input[type=search]')
    )
      return;
    if (event.key === ' ' && target.closest?.('button, input[type=checkbox]')) return;
    if (target.matches?.('input[type=range]') && target !== this.slider && event.key !== ' ') return;
    const actions = {
      ArrowLeft: () => setPosition(state.position - 1),
      ArrowRight: () => setPosition(state.position + 1),
      Home: () => setPosition(0),
      End: () => setPosition(state.steps.length - 1),
      ' ': () => this.setPlaying(!state.playing),
    };
    if (!(event.key in actions)) return;
    event.preventDefault();
    if (event.key !== ' ') this.setPlaying(false);
    actions[event.key]();
  }
}
