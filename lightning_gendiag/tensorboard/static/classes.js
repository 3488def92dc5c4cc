// Classes: which are generated too seldom or too often, and what their images look like.

import {pictureUrl} from './api.js';
import {Curves, Heat, scaleBar} from './charts.js';
import {colourOf} from './colours.js';
import {el, formatted} from './dom.js';
import {Panel, linked, swatch, titled} from './panel.js';
import {currentStep, extraAt, highlighted, state, valueAt} from './state.js';

export class Classes extends Panel {
  build() {
    this.rows = el('div', {class: 'bars', 'data-testid': 'class-bars'});
    this.heat = new Heat('Share of each class over steps', 150);
    this.curves = new Curves('Share of each class over steps', 165);
    this.canvas = el('canvas', {class: 'grid', role: 'img', 'data-testid': 'class-samples'});
    this.caption = el('h3');
    this.source = new Image();
    this.source.addEventListener('load', () => this.crop());
    this.body.classList.add('three');
    this.heatTitle = el('h3');
    this.body.append(
      titled('Share at the step; line: its interval; ◆: share in real data', this.rows),
      el('div', {class: 'block'}, this.heatTitle, this.heat.element, this.curves.element),
      el('div', {class: 'block'}, this.caption, this.canvas),
    );
  }

  draw() {
    const {monitor} = this;
    this.series = this.components;
    this.most = this.largest();
    this.entries = this.series.map((series) => this.row(series));
    this.rows.replaceChildren(...this.entries.map((entry) => entry.row));
    const expected = (row) => this.real(this.series[row]) ?? 1 / this.series.length;
    this.heatTitle.textContent = `Share of each class over steps${state.other ? `; dashed: ${state.compare}` : ''}`;
    this.heat.show({
      names: this.series.map((one) => one.name),
      steps: monitor.steps,
      values: this.series.map((one) => monitor.values[one.name] ?? []),
      scale: 'change',
      share: (value, row) => value / (2 * (expected(row) || 1e-9)),
      legend: scaleBar('change', 'none', 'twice', 'as many as in the real data'),
    });
    this.curves.show(this.curvesOf(this.series), this.alarmMarks());
  }

  /** Position of a class in lists with one entry for each class; classes may be numbered with gaps. */
  place(series) {
    return this.monitor.setup.classes?.indexOf(series.index) ?? series.index;
  }

  real(series) {
    return this.monitor.setup.real?.[this.place(series)];
  }

  /** The scale of the bars is the same at all steps, so that bars can be compared while the slider moves. */
  largest() {
    const shares = this.series.flatMap((one) => this.monitor.values[one.name] ?? []);
    const highs = (this.monitor.extra?.intervals ?? []).flatMap((one) =>
      (one ?? []).map((interval) => interval?.[1] ?? 0),
    );
    return [...shares, ...highs, ...(this.monitor.setup.real ?? [])].reduce(
      (most, value) => Math.max(most, value ?? 0),
      1e-9,
    );
  }

  row(series) {
    const bar = el('span', {class: 'bar', style: `background:${colourOf(series.place)}`});
    const interval = el('span', {class: 'interval'});
    const value = el('span', {class: 'value'});
    const real = this.real(series);
    const mark =
      real == null
        ? null
        : el(
            'span',
            {class: 'real', style: `left:${(100 * real) / this.most}%`, title: `real share: ${formatted(real)}`},
            '◆',
          );
    const row = linked(
      el(
        'button',
        {type: 'button', class: 'entry', 'data-name': series.name},
        swatch(series),
        el('span', {class: 'name', title: series.name}, series.name),
        el('span', {class: 'track'}, bar, interval, mark),
        value,
      ),
      [series.name],
    );
    return {series, row, bar, interval, value};
  }

  move() {
    const intervals = extraAt(this.monitor, 'intervals', currentStep()) ?? [];
    const inAlarm = this.inAlarm();
    for (const {series, row, bar, interval, value} of this.entries) {
      const share = valueAt(this.monitor, series.name, currentStep());
      const [low, high] = intervals[this.place(series)] ?? [];
      bar.style.width = `${(100 * (share ?? 0)) / this.most}%`;
      interval.hidden = low == null || high == null;
      interval.style.left = `${(100 * low) / this.most}%`;
      interval.style.width = `${(100 * (high - low)) / this.most}%`;
      value.textContent = formatted(share);
      row.classList.toggle('in-alarm', inAlarm.has(series.name));
    }
    this.heat.move();
    this.curves.move();
  }

  mark() {
    const names = highlighted();
    const isAny = this.series.some((one) => names.includes(one.name));
    for (const {series, row} of this.entries) {
      row.classList.toggle('on', names.includes(series.name));
      row.classList.toggle('off', isAny && !names.includes(series.name));
    }
    this.heat.mark();
    this.curves.mark();
    this.crop();
  }

  showFrame(frame) {
    this.frame = frame;
    const picture = frame.pictures?.classes;
    this.canvas.hidden = !picture;
    if (picture) this.source.src = pictureUrl(picture);
    else this.caption.textContent = 'No images of the classes in this run';
  }

  /** Shows the images of the highlighted class, or of all. */
  crop() {
    if (!this.frame?.pictures?.classes || !this.source.complete || !this.source.naturalWidth) return;
    const classes = this.frame.classes ?? [];
    const wanted = this.series.find((one) => highlighted().includes(one.name));
    const row = wanted ? classes.indexOf(wanted.index) : -1;
    const {naturalWidth: width, naturalHeight: height} = this.source;
    const rowHeight = height / Math.max(1, classes.length);
    const columns = this.monitor.setup.columns ?? Math.round(width / rowHeight);
    const perLine = row < 0 ? columns : Math.ceil(Math.sqrt(columns));
    const lines = row < 0 ? classes.length : Math.ceil(columns / perLine);
    const side = width / columns;
    this.canvas.width = perLine * side;
    this.canvas.height = lines * rowHeight;
    const context = this.canvas.getContext('2d');
    if (row < 0) context.drawImage(this.source, 0, 0);
    else {
      for (let i = 0; i < columns; i++) {
        const place = [(i % perLine) * side, Math.floor(i / perLine) * rowHeight, side, rowHeight];
        context.drawImage(this.source, i * side, row * rowHeight, side, rowHeight, ...place);
      }
    }
    const what =
      row < 0
        ? wanted
          ? `No images of ${wanted.name}; all classes`
          : 'Images, one row for each class'
        : `Images of ${wanted.name}`;
    this.caption.textContent = `${what}, step ${this.frame.step}`;
    this.canvas.setAttribute('aria-label', this.caption.textContent);
  }
}
