// Charts over steps and matrices. Plotly draws curves; heat maps and the line at the current step are our own, since they
// must follow the slider at once.

import {getPlotly} from './api.js';
import {channels, css, gradient, scaled, variable} from './colours.js';
import {debounced, el, formatted, plotlyText} from './dom.js';
import {choose, currentStep, goTo, highlighted, nearest, point, state} from './state.js';

const MARGIN = {l: 46, r: 14, t: 8, b: 34};
const HEAT_COLUMNS = 800;

/** Returns the first and the last step of the run; a single step has some room around it. */
export function stepRange() {
  const [first, last] = [state.steps[0] ?? 0, state.steps.at(-1) ?? 0];
  return first < last ? [first, last] : [first - 1, last + 1];
}

/** Returns the share of a step on the axis of all charts. */
export function stepShare(step, [first, last] = stepRange()) {
  return (step - first) / (last - first);
}

/** Curves by Plotly; pointing at a curve highlights its series everywhere, a click jumps to its step. */
export class Curves {
  constructor(label, height = 240) {
    this.line = el('div', {class: 'step-line', hidden: true});
    this.plot = el('div', {class: 'plot', style: `height:${height}px`});
    this.words = el('p', {class: 'missing', hidden: true});
    this.element = el(
      'div',
      {class: 'curves', role: 'img', 'aria-label': label, 'data-testid': 'curves'},
      this.plot,
      this.line,
      this.words,
    );
    this.curves = [];
    this.range = null;
  }

  /**
   * Draws curves: {name, steps, values, colour, dash, run}; marks {step, colour} are vertical lines. Of two curves in a row
   * with `isBound`, no line is seen, and the band between them has the colour `fill` of the second.
   */
  async show(curves, marks = []) {
    this.curves = curves;
    const hasValues = curves.some((curve) => curve.values.some((value) => value != null));
    this.tell(hasValues ? '' : 'There are no values yet.');
    if (!hasValues) return;
    try {
      this.plotly = await getPlotly();
    } catch (error) {
      this.tell(error.message);
      return;
    }
    await this.plotly.react(this.plot, curves.map(trace), this.layout(marks), {displayModeBar: false});
    if (!this.isReady) this.listen();
    this.isReady = true;
    this.key = null;
    this.mark();
    this.move();
  }

  /** Shows words in place of the curves. */
  tell(words) {
    this.words.textContent = words;
    this.words.hidden = !words;
    this.plot.hidden = !!words;
    this.line.hidden = !!words;
  }

  layout(marks) {
    const ink = variable('--fg');
    const line = variable('--line');
    const common = {gridcolor: line, zerolinecolor: line, linecolor: line, ticks: '', automargin: false};
    const [first, last] = stepRange();
    return {
      margin: MARGIN,
      showlegend: false,
      uirevision: state.run,
      hovermode: 'closest',
      hoverdistance: -1,
      dragmode: 'zoom',
      paper_bgcolor: 'rgba(0,0,0,0)',
      plot_bgcolor: 'rgba(0,0,0,0)',
      font: {color: ink, size: 11, family: 'inherit'},
      hoverlabel: {font: {size: 12}, namelength: -1},
      xaxis: {...common, range: [first, last], title: {text: 'step', standoff: 2}, nticks: 8},
      yaxis: {...common, nticks: 6},
      shapes: marks.map(({step, colour}) => ({
        type: 'line',
        x0: step,
        x1: step,
        y0: 0,
        y1: 1,
        yref: 'paper',
        opacity: 0.75,
        line: {color: colour, width: 2, dash: 'dash'},
      })),
    };
  }

  listen() {
    fitted(this.plotly, this.plot);
    this.plot.on('plotly_hover', (event) => point([this.curves[event.points[0].curveNumber].name]));
    this.plot.on('plotly_unhover', () => point([]));
    this.plot.on('plotly_click', (event) => goTo(event.points[0].x));
    this.plot.on('plotly_relayout', () => this.move());
  }

  /** Moves the line at the current step. */
  move() {
    if (!this.isReady || this.plot.hidden) return;
    const share = stepShare(currentStep(), this.plot.layout.xaxis.range.map(Number));
    this.line.hidden = share < 0 || share > 1;
    this.line.style.left = `calc(${MARGIN.l}px + ${share} * (100% - ${MARGIN.l + MARGIN.r}px))`;
  }

  mark() {
    if (!this.isReady || !this.curves.length) return;
    const names = highlighted();
    const isAny = this.curves.some((curve) => names.includes(curve.name));
    const on = this.curves.map((curve) => names.includes(curve.name));
    const key = isAny ? on.join() : '';
    if (key === this.key) return;
    this.key = key;
    this.plotly.restyle(this.plot, {
      opacity: this.curves.map((curve, i) => (isAny && !on[i] ? 0.2 : curve.run ? 0.8 : 1)),
      'line.width': on.map((is, i) => (this.curves[i].isBound ? 0 : isAny && is ? 3.5 : 1.7)),
    });
  }
}

function trace({name, steps, values, colour, dash, run, isBound, fill}) {
  const label = run ? `${name} (${run})` : name;
  if (isBound) {
    const band = fill ? {fill: 'tonexty', fillcolor: `rgb(${channels(fill).join(' ')} / 20%)`} : {};
    return {type: 'scatter', mode: 'lines', x: steps, y: values, hoverinfo: 'skip', line: {color: colour, width: 0}, ...band};
  }
  return {
    type: 'scatter',
    mode: hasLonePoint(values) ? 'lines+markers' : 'lines',
    marker: {size: 4, color: colour},
    x: steps,
    y: values,
    name: plotlyText(label),
    line: {color: colour, dash: run ? 'dash' : dash, width: 1.7},
    hovertemplate: `step %{x}<br>${plotlyText(label)}: %{y:.4g}<extra></extra>`,
  };
}

/** Keeps a plot as wide as its place, which also changes when a neighbour appears. */
export function fitted(plotly, plot) {
  const resize = debounced(() => plot.offsetWidth && plotly.Plots.resize(plot), 80);
  const observer = new ResizeObserver(resize);
  observer.observe(plot);
  plots.set(plot, () => {
    observer.disconnect();
    plotly.purge(plot);
  });
}

const plots = new Map(); // how each plot on the page is given back

/** Gives back the plots inside of an element that leaves the page, of which those in 3-D hold a context of the graphics card. */
export function release(element) {
  for (const [plot, end] of plots) {
    if (!element.contains(plot)) continue;
    end();
    plots.delete(plot);
  }
}

/** A value between two missing ones has no line, only a marker shows it. */
const hasLonePoint = (values) =>
  values.some((value, i) => value != null && values[i - 1] == null && values[i + 1] == null);

/** The colours of a scale with the values at its ends. */
export function scaleBar(scale, low, high, words) {
  return el(
    'span',
    {class: 'scale'},
    low,
    el('span', {class: 'scale-bar', style: `background:${gradient(scale)}`, 'aria-hidden': 'true'}),
    high,
    words ? el('span', {class: 'faint'}, words) : null,
  );
}

/** Paints rows over steps: `colour(row, index)` returns channels, or null for the background. */
export function paintRows(canvas, rows, steps, colour, [first, last] = stepRange()) {
  canvas.width = HEAT_COLUMNS;
  canvas.height = rows;
  const context = canvas.getContext('2d');
  const pixels = context.createImageData(HEAT_COLUMNS, rows);
  for (let column = 0; column < HEAT_COLUMNS; column++) {
    const step = first + ((column + 0.5) / HEAT_COLUMNS) * (last - first);
    for (let row = 0; row < rows; row++) {
      const own = steps[row];
      const rgb = own.length ? colour(row, nearest(own, step)) : null;
      if (rgb) pixels.data.set([...rgb, 255], 4 * (row * HEAT_COLUMNS + column));
    }
  }
  context.putImageData(pixels, 0, 0);
}

/** The step below the pointer, over an element that reaches from the first step to the last. */
export function stepBelow(event, element) {
  const area = element.getBoundingClientRect();
  const [first, last] = stepRange();
  return first + ((event.clientX - area.left) / area.width) * (last - first);
}

/** A heat map of series x step; pointing at a row highlights its series, a click jumps to the step. */
export class Heat {
  constructor(label, height = 200) {
    this.height = height;
    this.labels = el('div', {class: 'heat-labels'});
    this.canvas = el('canvas', {role: 'img', 'aria-label': label});
    this.line = el('div', {class: 'step-line'});
    this.box = el('div', {class: 'heat-box', hidden: true});
    this.area = el('div', {class: 'heat-area'}, this.canvas, this.box, this.line);
    this.axis = el('div', {class: 'axis'});
    this.readout = el('div', {class: 'readout'});
    this.element = el('div', {class: 'heat', 'data-testid': 'heat'}, this.labels, this.area, el('div'), this.axis, this.readout);
    this.area.addEventListener('pointermove', (event) => this.read(event));
    this.area.addEventListener('pointerleave', () => {
      point([]);
      this.readout.replaceChildren(this.legend);
    });
    this.area.addEventListener('click', (event) => goTo(this.stepAt(event)));
  }

  /** Draws `names` x `steps`; `share(value, row)` places a value on the scale; `legend` explains the colours. */
  show({names, steps, values, scale, share, legend}) {
    Object.assign(this, {names, steps, values, legend});
    paintRows(
      this.canvas,
      names.length,
      names.map(() => steps),
      (row, i) => {
        const value = values[row]?.[i];
        return value == null ? null : scaled(scale, share(value, row));
      },
    );
    this.area.style.height = `${this.height}px`;
    const every = Math.ceil((13 * names.length) / this.height);
    this.labels.replaceChildren(
      ...names.map((name, i) =>
        el('span', {style: `top:${(100 * (i + 0.5)) / names.length}%`, title: name}, i % every ? '' : name),
      ),
    );
    drawAxis(this.axis);
    this.readout.replaceChildren(legend);
    this.move();
    this.mark();
  }

  stepAt(event) {
    return stepBelow(event, this.area);
  }

  read(event) {
    const area = this.area.getBoundingClientRect();
    const row = Math.min(
      this.names.length - 1,
      Math.max(0, Math.floor(((event.clientY - area.top) / area.height) * this.names.length)),
    );
    const at = nearest(this.steps, this.stepAt(event));
    this.readout.textContent = `${this.names[row]} at step ${this.steps[at]}: ${formatted(this.values[row]?.[at])}`;
    point([this.names[row]]);
  }

  move() {
    this.line.style.left = `${100 * stepShare(currentStep())}%`;
  }

  mark() {
    const row = this.names?.indexOf(highlighted()[0]) ?? -1;
    this.box.hidden = row < 0;
    if (row < 0) return;
    this.box.style.top = `${(100 * row) / this.names.length}%`;
    this.box.style.height = `${100 / this.names.length}%`;
  }
}

/** Draws round steps below a chart. */
export function drawAxis(axis) {
  const [first, last] = stepRange();
  const rough = (last - first) / 6;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const every = Math.max(1, unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough));
  const ticks = [];
  for (let step = Math.ceil(first / every) * every; step <= last; step += every) ticks.push(step);
  axis.replaceChildren(
    ...ticks.map((step) =>
      el('span', {style: `left:${100 * stepShare(step)}%`}, step >= 10000 ? `${step / 1000}k` : String(step)),
    ),
  );
}

/** A matrix of cells with labels; pointing at a cell calls `pointed(row, column)`. */
export class Matrix {
  constructor(label, {columnWord = '', width = 260, height = width} = {}) {
    this.rows = el('div', {class: 'heat-labels'});
    this.columns = el('div', {class: 'matrix-columns'});
    this.canvas = el('canvas', {role: 'img', 'aria-label': label});
    this.boxes = [el('div', {class: 'heat-box', hidden: true}), el('div', {class: 'heat-box', hidden: true})];
    this.area = el('div', {class: 'heat-area', style: `height:${height}px`}, this.canvas, ...this.boxes);
    this.readout = el('div', {class: 'readout'});
    this.word = el('div', {class: 'faint matrix-word'}, columnWord);
    this.element = el(
      'div',
      {class: 'matrix', style: `max-width:${width + 96}px`},
      this.rows,
      this.area,
      el('div'),
      this.columns,
      el('div'),
      this.word,
      this.readout,
    );
    this.size = {width, height};
    this.area.addEventListener('pointermove', (event) => this.read(event));
    this.area.addEventListener('pointerleave', () => {
      point([]);
      this.readout.replaceChildren(this.legend);
    });
    this.area.addEventListener('click', (event) => choose(this.namesAt(...this.cell(event))));
  }

  /** `text(row, column)` describes a cell, `namesAt(row, column)` are the series it is about. */
  show({rows, columns, cells, scale, share, legend, text, namesAt}) {
    Object.assign(this, {
      names: rows,
      shape: [rows.length, columns.length],
      legend,
      text,
      namesAt,
      isSquare: rows.length === columns.length,
    });
    this.canvas.width = columns.length;
    this.canvas.height = rows.length;
    const context = this.canvas.getContext('2d');
    cells.forEach((line, row) =>
      line.forEach((value, column) => {
        if (value == null) return;
        context.fillStyle = css(scaled(scale, share(value, row, column)));
        context.fillRect(column, row, 1, 1);
      }),
    );
    this.rows.replaceChildren(...labelled(rows, this.size.height, 13, 'top'));
    this.columns.replaceChildren(...labelled(columns.map(shortened), this.size.width, 26, 'left'));
    this.readout.replaceChildren(legend);
    this.mark();
  }

  cell(event) {
    const area = this.area.getBoundingClientRect();
    const at = (share, count) => Math.max(0, Math.min(count - 1, Math.floor(share * count)));
    return [
      at((event.clientY - area.top) / area.height, this.shape[0]),
      at((event.clientX - area.left) / area.width, this.shape[1]),
    ];
  }

  read(event) {
    const cell = this.cell(event);
    this.readout.textContent = this.text(...cell);
    point(this.namesAt(...cell));
  }

  mark() {
    const row = this.names?.indexOf(highlighted()[0]) ?? -1;
    this.boxes[0].hidden = row < 0;
    this.boxes[1].hidden = row < 0 || !this.isSquare;
    if (row < 0) return;
    Object.assign(this.boxes[0].style, {top: `${(100 * row) / this.shape[0]}%`, height: `${100 / this.shape[0]}%`});
    Object.assign(this.boxes[1].style, {
      left: `${(100 * row) / this.shape[1]}%`,
      width: `${100 / this.shape[1]}%`,
      height: '100%',
    });
  }
}

/** Names such as "class 3" become "3" where there is little room. */
const shortened = (name) => name.match(/\d+(\.\d+)?$/)?.[0] ?? name;

function labelled(names, length, room, side) {
  const every = Math.ceil((room * names.length) / length);
  return names.map((name, i) =>
    el('span', {style: `${side}:${(100 * (i + 0.5)) / names.length}%`, title: name}, i % every ? '' : name),
  );
}
