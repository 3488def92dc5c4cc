// What all panels share: they are drawn when they come into view, and each update does only what has changed.

import {getFrame} from './api.js';
import {release} from './charts.js';
import {colourOf, dashOf} from './colours.js';
import {debounced, el, formatted, svg} from './dom.js';
import {
  alarmsOf,
  beganAt,
  choose,
  currentStep,
  frameStep,
  highlighted,
  namesInAlarm,
  namesOf,
  point,
  state,
  twin,
  valueAt,
  withRole,
} from './state.js';

const FRAME_DELAY = 50;

export class Panel {
  showsFrames = true; // whether pictures and arrays of the step are asked for

  /** `title` says what is shown, `help` how to read it. */
  constructor(name, title, help = '') {
    this.name = name;
    this.body = el('div', {class: 'panel-body'});
    this.words = el('p', {class: 'missing', role: 'status', hidden: true});
    this.element = el(
      'section',
      {
        class: 'panel',
        'data-testid': `panel-${this.monitor?.diagnostic ?? name}`,
        'data-monitor': name,
        'aria-label': title,
      },
      el(
        'header',
        {},
        el('h2', {}, title),
        this.monitor ? el('span', {class: 'faint'}, name) : null,
        help ? el('p', {class: 'help'}, help) : null,
      ),
      this.body,
      this.words,
    );
    this.wantFrame = debounced(() => this.loadFrame(), FRAME_DELAY);
  }

  get monitor() {
    return state.data?.monitors?.[this.name];
  }

  get components() {
    return withRole(this.monitor, 'component');
  }

  /** Creates the elements, once. */
  build() {}

  /** Draws all that depends on the data of the run. */
  draw() {}

  /** Draws what depends on the step. */
  move() {}

  /** Draws what depends on what is highlighted. */
  mark() {}

  /** Draws pictures and arrays of a frame. */
  showFrame() {}

  /** Applies what changed: draw, move or mark; a failure is shown in words and leaves the other panels alone. */
  update(change) {
    try {
      if (!this.isBuilt) this.build();
      this.isBuilt = true;
      this.element.classList.add('built');
      if (change === 'draw') this.draw();
      if (change !== 'mark') this.move();
      this.mark();
      this.showHighlight();
      if (change !== 'mark' && this.showsFrames && this.monitor?.frames?.length) {
        if (change === 'draw') this.shown = null;
        this.wantFrame();
      }
    } catch (error) {
      this.tell(`This panel could not be drawn: ${error.message}`);
    }
  }

  showHighlight() {
    const own = new Set((this.monitor?.series ?? []).map((one) => one.name));
    this.element.dataset.highlight = highlighted()
      .filter((name) => own.has(name))
      .join(', ');
  }

  tell(words) {
    this.words.textContent = words;
    this.words.hidden = !words;
  }

  async loadFrame() {
    const wanted = frameStep(this.monitor, currentStep());
    const key = `${state.run} ${wanted}`;
    if (key === this.shown) return;
    this.wanted = key;
    try {
      const frame = await getFrame(state.run, this.name, wanted);
      if (key !== this.wanted) return; // the slider has moved on
      this.shown = key;
      await this.showFrame(frame);
      this.mark();
      this.tell('');
    } catch (error) {
      if (key === this.wanted) this.tell(`Pictures of step ${wanted} could not be loaded. ${error.message}`);
    }
  }

  /** Returns the curves of series for {@link Curves}, those of the compared run dashed. */
  curvesOf(series) {
    const curve = (monitor, one, run) => ({
      name: one.name,
      steps: monitor.steps,
      values: monitor.values[one.name] ?? [],
      run,
      dash: dashOf(one.place),
      colour: colourOf(one.place),
    });
    const other = twin(this.name);
    const dashed = other
      ? series.filter((one) => other.values[one.name]).map((one) => curve(other, one, state.compare))
      : [];
    return [...series.map((one) => curve(this.monitor, one)), ...dashed];
  }

  /** Returns where alarms began, as vertical lines for {@link Curves}. */
  alarmMarks() {
    const place = new Map(this.monitor.series.map((one) => [one.name, one.place]));
    return alarmsOf(this.name).map((alarm) => ({step: beganAt(alarm), colour: colourOf(place.get(namesOf(alarm)[0]))}));
  }

  inAlarm() {
    return namesInAlarm(this.name, currentStep());
  }
}

/** Panels of which only those in view are updated; the others catch up when they come into view. */
export class Panels {
  constructor(container) {
    this.container = container;
    this.list = [];
    this.visible = new Set();
    this.behind = new Map();
    this.observer = new IntersectionObserver((entries) => this.seen(entries), {rootMargin: '150px'});
  }

  set(panels) {
    this.observer.disconnect();
    for (const panel of this.list) release(panel.element);
    this.visible.clear();
    this.list = panels;
    this.behind = new Map(panels.map((panel) => [panel, 'draw']));
    this.container.replaceChildren(...panels.map((panel) => panel.element));
    for (const panel of panels) {
      panel.element.panel = panel;
      this.observer.observe(panel.element);
    }
  }

  seen(entries) {
    for (const {target, isIntersecting} of entries) {
      const {panel} = target;
      if (!isIntersecting) this.visible.delete(panel);
      else {
        this.visible.add(panel);
        if (this.behind.has(panel)) panel.update(this.behind.get(panel));
        this.behind.delete(panel);
      }
    }
  }

  update(change) {
    const order = ['mark', 'move', 'draw'];
    for (const panel of this.list) {
      if (this.visible.has(panel)) {
        panel.update(change);
        continue;
      }
      panel.showHighlight();
      if (order.indexOf(change) > order.indexOf(this.behind.get(panel))) this.behind.set(panel, change);
    }
  }
}

/** Highlights the names of an element while the pointer or the focus is on it, and keeps them on a click. */
export function linked(element, names) {
  element.addEventListener('pointerenter', () => point(names));
  element.addEventListener('pointerleave', () => point([]));
  element.addEventListener('focus', () => element.matches(':focus-visible') && point(names));
  element.addEventListener('blur', () => point([]));
  element.addEventListener('click', () => choose(names));
  return element;
}

export function swatch(series) {
  const dashes = {solid: null, dot: '2 2', dashdot: '5 2 1 2', longdashdot: '8 2 1 2'};
  return svg(
    'svg',
    {class: 'swatch', viewBox: '0 0 16 10', 'aria-hidden': 'true'},
    svg('line', {
      x1: 0,
      x2: 16,
      y1: 5,
      y2: 5,
      stroke: colourOf(series.place),
      'stroke-width': 5,
      'stroke-dasharray': dashes[dashOf(series.place)],
    }),
  );
}

/** A legend whose entries highlight their series and show their values at the step. */
export class Legend {
  /** `words(series)` returns the text of the value. */
  constructor(panel, words = (series) => formatted(valueAt(panel.monitor, series.name, currentStep()))) {
    this.panel = panel;
    this.words = words;
    this.element = el('div', {class: 'legend', 'data-testid': 'legend'});
  }

  draw(series) {
    const key = series.map((one) => one.name).join('\n');
    if (key === this.key) return;
    this.key = key;
    this.entries = series.map((one) => {
      const value = el('span', {class: 'value'});
      const button = linked(
        el(
          'button',
          {type: 'button', class: 'entry', 'data-name': one.name},
          swatch(one),
          el('span', {class: 'name', title: one.name}, one.name),
          value,
        ),
        [one.name],
      );
      return {series: one, value, button};
    });
    this.element.replaceChildren(...this.entries.map((entry) => entry.button));
  }

  move() {
    const inAlarm = this.panel.inAlarm();
    for (const {series, value, button} of this.entries) {
      value.textContent = this.words(series);
      button.classList.toggle('in-alarm', inAlarm.has(series.name));
    }
  }

  mark() {
    const names = highlighted();
    const isAny = this.entries.some(({series}) => names.includes(series.name));
    for (const {series, button} of this.entries) {
      const isOn = names.includes(series.name);
      button.classList.toggle('on', isOn);
      button.classList.toggle('off', isAny && !isOn);
    }
  }
}

/** A picture with a caption above it. */
export class Picture {
  constructor(caption, attributes = {}) {
    this.caption = el('figcaption', {}, caption);
    this.image = el('img', {alt: caption, decoding: 'async', ...attributes});
    this.stack = el('div', {class: 'stack'}, this.image);
    this.element = el('figure', {hidden: true}, this.caption, this.stack);
    this.image.addEventListener('error', () => {
      this.caption.textContent = `${this.caption.textContent} (could not be loaded)`;
    });
  }

  show(url, caption) {
    this.element.hidden = false;
    this.caption.textContent = caption;
    this.image.alt = caption;
    if (this.image.getAttribute('src') !== url) this.image.setAttribute('src', url);
  }
}

export const titled = (title, ...content) => el('div', {class: 'block'}, el('h3', {}, title), ...content);
