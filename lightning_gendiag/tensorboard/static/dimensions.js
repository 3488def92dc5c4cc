// Latent dimensions: how much each is used, over time, and which ones share what they do.

import {Curves, Heat, Matrix, scaleBar} from './charts.js';
import {colourOf} from './colours.js';
import {el, formatted, freshId} from './dom.js';
import {Panel, titled} from './panel.js';
import {choose, currentStep, highlighted, point, valueAt, withRole} from './state.js';
import {quantityOf} from './titles.js';

export class Dimensions extends Panel {
  build() {
    this.bars = el('div', {
      class: 'spectrum',
      tabindex: 0,
      role: 'listbox',
      'aria-label': 'Spectrum of the latent dimensions; up and down arrows choose one',
      'data-testid': 'spectrum',
      onkeydown: (event) => this.walk(event),
    });
    this.bars.addEventListener(
      'pointerover',
      (event) => event.target.dataset.name && point([event.target.dataset.name]),
    );
    this.bars.addEventListener('pointerleave', () => point([]));
    this.bars.addEventListener('click', (event) => event.target.dataset.name && choose([event.target.dataset.name]));
    this.spectrumWords = el('div', {class: 'readout'});
    const id = freshId();
    this.sorted = el('input', {type: 'checkbox', id, onchange: () => this.move()});
    this.heat = new Heat('Latent dimensions over steps', 210);
    this.curves = new Curves('Curve of the highlighted dimension', 200);
    this.curvesTitle = el('h3');
    this.spectrumTitle = el('h3', {'data-testid': 'spectrum-title'});
    this.heatTitle = el('h3');
    this.body.classList.add('dimensions');
    this.matrix = new Matrix('Mutual information of pairs of dimensions', {width: 230});
    this.matrixBlock = titled('Mutual information of pairs', this.matrix.element);
    const hasMatrix = this.monitor.diagnostic === 'ManifoldEntropy' && this.monitor.frames?.length > 0;
    this.matrixBlock.hidden = !hasMatrix;
    this.body.classList.toggle('with-matrix', hasMatrix);
    this.body.append(
      el(
        'div',
        {class: 'block'},
        this.spectrumTitle,
        this.bars,
        this.spectrumWords,
        el('label', {for: id, class: 'options'}, this.sorted, 'largest first'),
      ),
      el('div', {class: 'block'}, this.heatTitle, this.heat.element),
      el('div', {class: 'block curve'}, this.curvesTitle, this.curves.element),
      this.matrixBlock,
    );
  }

  draw() {
    const {monitor} = this;
    this.series = this.components;
    this.others = withRole(monitor, 'aggregate', 'standalone', 'rule', 'record');
    this.quantity = quantityOf(this.series[0]);
    const values = this.series.map((one) => monitor.values[one.name] ?? []);
    this.limits = limitsOf(values.flat());
    const [low, high] = this.limits;
    this.share = (value) => (value - low) / (high - low);
    this.columns = this.series.map((series) => {
      const bar = el('span', {class: 'stem', style: `background:${colourOf(series.place)}`});
      return {
        series,
        bar,
        column: el(
          'span',
          {class: 'column', role: 'option', 'data-name': series.name, title: series.name, 'data-index': series.index},
          bar,
        ),
      };
    });
    this.bars.replaceChildren(...this.columns.map((one) => one.column));
    this.bars.classList.toggle('numbered', this.series.length <= 32);
    this.heatTitle.textContent = `${capital(this.quantity)} over steps`;
    this.heat.show({
      names: this.series.map((one) => one.name),
      steps: monitor.steps,
      values,
      scale: 'amount',
      share: this.share,
      legend: scaleBar('amount', formatted(low), formatted(high)),
    });
    this.curveKey = null;
  }

  move() {
    const step = currentStep();
    const inAlarm = this.inAlarm();
    const values = this.columns.map(({series}) => valueAt(this.monitor, series.name, step));
    const order = this.sorted.checked ? ranks(values) : values.map((_, i) => i);
    this.order = this.series.map((one, i) => [order[i], one]).sort(([a], [b]) => a - b).map(([, one]) => one);
    this.columns.forEach(({series, bar, column}, i) => {
      bar.style.height = values[i] == null ? '0' : `${Math.max(1, 100 * this.share(values[i]))}%`;
      column.style.order = order[i];
      column.classList.toggle('in-alarm', inAlarm.has(series.name));
    });
    this.spectrumTitle.textContent = `${capital(this.quantity)} of each dimension, step ${step}`;
    this.heat.move();
    this.curves.move();
    this.showValue();
  }

  mark() {
    const names = highlighted();
    const isAny = this.series.some((one) => names.includes(one.name));
    for (const {series, column} of this.columns) {
      const isOn = names.includes(series.name);
      column.classList.toggle('on', isOn);
      column.classList.toggle('off', isAny && !isOn);
      column.setAttribute('aria-selected', String(isOn));
    }
    this.heat.mark();
    this.matrix.mark();
    this.showValue();
    this.showCurve();
  }

  showValue() {
    const name = highlighted().find((one) => this.series.some((series) => series.name === one));
    const [low, high] = this.limits;
    this.spectrumWords.textContent = name
      ? `${name}: ${formatted(valueAt(this.monitor, name, currentStep()))}`
      : `Bars from ${formatted(low)} to ${formatted(high)}. Point at one to see its curve.`;
  }

  /** Draws the curves of the highlighted dimensions, else of what the monitor measures as a whole, else of all. */
  showCurve() {
    const names = highlighted();
    const wanted = this.series.filter((one) => names.includes(one.name));
    const series = wanted.length ? wanted : this.others.length ? this.others : this.series.slice(0, 12);
    const key = series.map((one) => one.name).join('\n');
    if (key === this.curveKey) return;
    this.curveKey = key;
    const all =
      series.length === this.series.length
        ? 'all dimensions'
        : `dimensions 1 to ${series.length} of ${this.series.length}`;
    this.curvesTitle.textContent = wanted.length
      ? `${capital(this.quantity)}: ${wanted.map((one) => one.name).join(', ')}`
      : this.others.length
        ? 'All dimensions together'
        : `${capital(this.quantity)}: ${all}`;
    this.curves.show(this.curvesOf(series), this.alarmMarks());
  }

  walk(event) {
    const direction = {ArrowUp: -1, ArrowDown: 1}[event.key];
    if (!direction) return;
    event.preventDefault();
    const {order} = this;
    const at = order.findIndex((one) => highlighted().includes(one.name));
    const next = at < 0 ? order.at(direction > 0 ? 0 : -1) : order[(at + direction + order.length) % order.length];
    if (!highlighted().includes(next.name)) choose([next.name]);
  }

  showFrame(frame) {
    const cells = frame.arrays?.mutual_information;
    this.matrixBlock.hidden = !cells;
    this.body.classList.toggle('with-matrix', !!cells);
    if (!cells) return;
    const nameOf = new Map(this.series.map((one) => [one.index, one.name]));
    const names = (frame.dimensions ?? cells.map((_, i) => i)).map((d) => nameOf.get(d) ?? `dimension ${d}`);
    // a dimension's information about itself says nothing about the others
    const most = cells.reduce(
      (largest, line, row) =>
        line.reduce((a, value, column) => (row === column ? a : Math.max(a, value ?? 0)), largest),
      1e-9,
    );
    this.matrix.show({
      rows: names,
      columns: names,
      cells: cells.map((line, row) => line.map((value, column) => (row === column ? null : value))),
      scale: 'heat',
      share: (value) => value / most,
      legend: scaleBar('heat', '0', formatted(most), `step ${frame.step}`),
      text: (row, column) =>
        row === column ? names[row] : `${names[row]} and ${names[column]}: ${formatted(cells[row][column])}`,
      namesAt: (row, column) => (row === column ? [names[row]] : [names[row], names[column]]),
    });
  }
}

const capital = (words) => words[0].toUpperCase() + words.slice(1);

/** Returns the range of values, without the most extreme hundredth on either side. */
function limitsOf(values) {
  const sorted = values.filter((value) => value != null).sort((a, b) => a - b);
  if (!sorted.length) return [0, 1];
  const [low, high] = [0.01, 0.99].map((share) => sorted[Math.round(share * (sorted.length - 1))]);
  const base = low > 0 ? 0 : low;
  return high > base ? [base, high] : [base, base + 1];
}

/** Returns the place of each value when the largest comes first. */
function ranks(values) {
  const order = values.map((_, i) => i).sort((a, b) => (values[b] ?? -Infinity) - (values[a] ?? -Infinity));
  const places = [];
  order.forEach((index, place) => {
    places[index] = place;
  });
  return places;
}
