// Before and after: two pictures on top of each other and a control that wipes between them.

import {getFrame, pictureUrl} from './api.js';
import {choice, el, freshId} from './dom.js';
import {Panel} from './panel.js';
import {alarms, atOrBefore, beganAt, currentStep, frameStep, monitors, state, twin} from './state.js';

const PICTURES = {
  CosineMeanSimilarity: ['mean_generated', 'samples'],
  GenerationBalance: ['classes'],
  RegionalPrimitives: ['strip'],
};
const WORDS = {
  mean_generated: 'Mean of generated images',
  samples: 'Generated images',
  classes: 'One row for each class',
  strip: 'Largest components',
};

export const withPictures = () => monitors().filter(([, one]) => PICTURES[one.diagnostic] && one.frames?.length);

export class Wipe extends Panel {
  constructor() {
    super(
      'wipe',
      'Before and after',
      'Move the control to wipe between two steps, or between two runs at the same step.',
    );
  }

  get monitor() {
    return state.data?.monitors?.[this.chosenMonitor];
  }

  build() {
    const [which, step] = [freshId(), freshId()];
    this.which = el('select', {
      id: which,
      'data-testid': 'wipe-monitor',
      onchange: () => {
        this.chosenMonitor = this.which.value;
        this.hasChosen = false; // the other monitor has frames at other steps
        this.draw();
        this.wantFrame();
      },
    });
    this.from = el('select', {
      id: step,
      'data-testid': 'wipe-step',
      onchange: () => {
        this.hasChosen = true;
        this.refresh();
      },
    });
    const group = freshId();
    const option = (mode, words) =>
      choice(group, mode, words, {
        'data-testid': `wipe-${mode}`,
        onchange: () => {
          this.mode = mode;
          this.refresh();
        },
      });
    this.modes = el(
      'span',
      {class: 'options', role: 'radiogroup', 'aria-label': 'What is compared'},
      option('steps', 'two steps'),
      option('runs', 'two runs'),
    );
    this.fromLabel = el('label', {for: step}, 'before: step ', this.from);
    this.range = el('input', {
      type: 'range',
      min: 0,
      max: 100,
      value: 50,
      'aria-label': 'Wipe between before and after',
      'data-testid': 'wipe',
      oninput: () => this.cut(),
    });
    this.stages = el('div', {class: 'stages'});
    this.sides = el('div', {class: 'sides'});
    this.body.append(
      el('div', {class: 'controls'}, el('label', {for: which}, 'pictures of ', this.which), this.modes, this.fromLabel),
      this.sides,
      this.range,
      this.stages,
    );
    this.mode = 'steps';
  }

  draw() {
    const names = withPictures().map(([name]) => name);
    if (!names.includes(this.chosenMonitor)) this.chosenMonitor = names[0];
    this.which.replaceChildren(
      ...names.map((name) => el('option', {value: name, selected: name === this.chosenMonitor}, name)),
    );
    if (this.run !== state.run) this.hasChosen = false;
    this.run = state.run;
    const chosen = this.hasChosen ? this.from.value : null;
    this.from.replaceChildren(
      ...this.monitor.frames.map((step) =>
        el('option', {value: step, selected: String(step) === chosen}, String(step)),
      ),
    );
    if (!this.hasChosen) this.from.value = this.usualStart();
    this.setMode(
      twin(this.chosenMonitor)?.frames?.length ? (this.compared === state.compare ? this.mode : 'runs') : 'steps',
    );
    this.compared = state.compare;
    this.shown = null;
  }

  /** The last frame from before the newest alarm of the monitor, or the first frame. */
  usualStart() {
    const own = alarms().filter((one) => one.diagnostic === this.chosenMonitor);
    const alarm = own.findLast((one) => one.recovered == null) ?? own.at(-1) ?? alarms().at(-1);
    const {frames} = this.monitor;
    return frames[Math.max(0, alarm ? atOrBefore(frames, beganAt(alarm) - 1) : 0)];
  }

  setMode(mode) {
    this.mode = mode;
    for (const input of this.modes.querySelectorAll('input')) {
      input.checked = input.value === mode;
      input.disabled = input.value === 'runs' && !twin(this.chosenMonitor)?.frames?.length;
      input.parentElement.title = input.disabled ? 'Choose a run to compare at the top of the page' : '';
    }
  }

  refresh() {
    this.shown = null;
    this.wantFrame();
  }

  async loadFrame() {
    const isSteps = this.mode === 'steps';
    this.fromLabel.hidden = !isSteps;
    const after = frameStep(this.monitor, currentStep());
    const before = isSteps ? Number(this.from.value) : frameStep(twin(this.chosenMonitor), currentStep());
    const run = isSteps ? state.run : state.compare;
    const key = JSON.stringify([run, before, state.run, after, this.chosenMonitor]);
    if (key === this.shown) return;
    this.wanted = key;
    try {
      const [left, right] = await Promise.all([
        getFrame(run, this.chosenMonitor, before),
        getFrame(state.run, this.chosenMonitor, after),
      ]);
      if (key !== this.wanted) return;
      this.shown = key;
      this.showPictures(left, right);
      const label = (name, step) => (isSteps ? `step ${step}` : `${name}, step ${step}`);
      this.sides.replaceChildren(
        el('span', {}, `◀ ${label(run, left.step)}`),
        el('span', {}, `${label(state.run, right.step)} ▶`),
      );
    } catch (error) {
      this.tell(`The pictures could not be loaded. ${error.message}`);
    }
  }

  showPictures(left, right) {
    const names = PICTURES[this.monitor.diagnostic].filter((name) => left.pictures?.[name] && right.pictures?.[name]);
    this.tell(names.length ? '' : 'There are no pictures at these steps.');
    const shape = names.map((name) => `${name} ${right.pictures[name].width}`).join();
    if (shape !== this.shape) this.buildStages(names, right);
    this.shape = shape;
    for (const {name, under, over} of this.parts) {
      under.src = pictureUrl(right.pictures[name]);
      over.src = pictureUrl(left.pictures[name]);
    }
    this.cut();
  }

  buildStages(names, frame) {
    this.parts = names.map((name) => ({
      name,
      under: el('img', {alt: `${WORDS[name]}, after`}),
      over: el('img', {alt: `${WORDS[name]}, before`, class: 'over'}),
      edge: el('div', {class: 'edge'}),
    }));
    this.stages.replaceChildren(
      ...this.parts.map(({name, under, over, edge}) => {
        const {width, height} = frame.pictures[name];
        const stack = el(
          'div',
          {class: 'stack wipe-stack', style: `aspect-ratio:${width}/${height}`},
          under,
          over,
          edge,
        );
        const follow = (event) => event.buttons && this.drag(event, stack);
        stack.addEventListener('pointerdown', follow);
        stack.addEventListener('pointermove', follow);
        return el('figure', {style: `flex:${width / height} 1 0`}, el('figcaption', {}, WORDS[name]), stack);
      }),
    );
  }

  drag(event, stack) {
    const area = stack.getBoundingClientRect();
    event.preventDefault();
    this.range.value = (100 * (event.clientX - area.left)) / area.width;
    this.cut();
  }

  cut() {
    const at = this.range.value;
    for (const {over, edge} of this.parts ?? []) {
      over.style.clipPath = `inset(0 ${100 - at}% 0 0)`;
      edge.style.left = `${at}%`;
    }
  }
}
