// All series over all steps: one row each, dark where a series is far from its usual level, with the alarms on it.

import {drawAxis, paintRows, scaleBar, stepBelow, stepRange, stepShare} from './charts.js';
import {colourOf, scaled} from './colours.js';
import {el, formatted} from './dom.js';
import {linked} from './panel.js';
import {
  alarmsOf,
  beganAt,
  chooseAlarm,
  currentStep,
  goTo,
  highlighted,
  monitors,
  namesOf,
  nearest,
  point,
  withRole,
} from './state.js';
import {severities, severityShare} from './severity.js';
import {titleOf} from './titles.js';

const FEW = 12;

export class Timeline {
  constructor() {
    this.labels = el('div', {class: 'rows'});
    this.canvas = el('canvas', {
      role: 'img',
      'aria-label': 'Deviation of each series from its usual level, over steps',
      'data-testid': 'timeline',
    });
    this.marks = el('div', {class: 'marks'});
    this.box = el('div', {class: 'heat-box', hidden: true});
    this.line = el('div', {class: 'step-line'});
    this.area = el('div', {class: 'timeline-area'}, this.canvas, this.box, this.marks, this.line);
    this.axis = el('div', {class: 'axis'});
    this.pictures = el('div', {class: 'ticks', title: 'Steps with pictures'});
    this.readout = el('div', {class: 'readout'});
    this.element = el(
      'section',
      {class: 'panel timeline', 'data-testid': 'panel-timeline', 'aria-label': 'Timeline'},
      el('header', {}, el('h2', {}, 'Timeline'), this.readout),
      el(
        'div',
        {class: 'timeline-grid'},
        this.labels,
        this.area,
        el('div', {class: 'faint ticks-word'}, 'steps with pictures'),
        this.pictures,
        el('div'),
        this.axis,
      ),
    );
    this.opened = new Map();
    this.area.addEventListener('pointermove', (event) => this.read(event));
    this.area.addEventListener('pointerleave', () => {
      point([]);
      this.showLegend();
    });
    this.area.addEventListener('pointerdown', (event) => !event.target.closest('button') && goTo(this.stepAt(event)));
  }

  draw() {
    this.severities = new Map(monitors().map(([name, monitor]) => [name, severities(name, monitor)]));
    this.drawRows();
  }

  drawRows() {
    this.rows = monitors().flatMap(([name, monitor]) => this.rowsOf(name, monitor));
    this.labels.replaceChildren(...this.rows.map((row) => row.label));
    this.area.style.height = `calc(${this.rows.length} * var(--row))`;
    paintRows(
      this.canvas,
      this.rows.length,
      this.rows.map((row) => row.steps),
      (row, i) => {
        const value = this.rows[row].values[i];
        return value == null ? null : scaled('heat', severityShare(value - this.rows[row].byChance));
      },
    );
    this.drawMarks();
    drawAxis(this.axis);
    const framed = new Set(monitors().flatMap(([, monitor]) => monitor.frames ?? []));
    this.pictures.replaceChildren(...[...framed].map((step) => el('i', {style: `left:${100 * stepShare(step)}%`})));
    this.showLegend();
    this.move();
    this.mark();
  }

  /**
   * Returns a row for the worst series of a monitor, and rows for its series where it is open. The worst of many series is
   * further from its level by chance, about by the logarithm of their number.
   */
  rowsOf(name, monitor) {
    const all = this.severities.get(name);
    const inAlarm = new Set(alarmsOf(name).flatMap(namesOf));
    const usual = inAlarm.size
      ? monitor.series.filter((one) => inAlarm.has(one.name) || (monitor.series.length <= FEW && !['record', 'rule'].includes(one.role)))
      : [];
    const isOpen = this.opened.get(name) ?? usual.length > 0;
    const shown = !isOpen ? [] : this.opened.has(name) || !usual.length ? monitor.series : usual;
    const judged = withRole(monitor, 'component', 'aggregate', 'standalone').map((one) => all[one.name]);
    const lists = judged.length ? judged : Object.values(all);
    const worst = monitor.steps.map((_, i) =>
      lists.reduce((most, list) => (list[i] == null ? most : Math.max(most ?? 0, list[i])), null),
    );
    const button = el(
      'button',
      {
        type: 'button',
        class: 'group',
        'aria-expanded': String(isOpen),
        title: `${name}: the worst of ${lists.length} series`,
        onclick: () => {
          this.opened.set(name, !isOpen);
          this.drawRows();
        },
      },
      el('span', {'aria-hidden': 'true'}, isOpen ? '▾' : '▸'),
      labelOf(name, monitor.diagnostic),
    );
    const head = {
      name,
      monitor,
      steps: monitor.steps,
      values: worst,
      label: button,
      names: [],
      byChance: Math.log(lists.length),
      alarms: isOpen ? [] : alarmsOf(name),
    };
    return [head, ...shown.map((series) => this.seriesRow(name, monitor, series, all[series.name]))];
  }

  seriesRow(name, monitor, series, values) {
    const own = alarmsOf(name).filter((alarm) => namesOf(alarm).includes(series.name));
    const isPart = withRole(monitor, 'component').includes(series);
    const label = linked(
      el(
        'button',
        {type: 'button', class: 'series', 'data-name': series.name, title: series.name},
        el('i', {class: 'dot', style: isPart ? `background:${colourOf(series.place)}` : 'background:transparent'}),
        el('span', {class: 'name'}, series.name),
      ),
      [series.name],
    );
    return {name, monitor, series, steps: monitor.steps, values, label, names: [series.name], byChance: 0, alarms: own};
  }

  drawMarks() {
    const last = stepRange()[1];
    this.marks.replaceChildren(
      ...this.rows.flatMap((row, at) =>
        row.alarms.flatMap((alarm) => {
          const top = `calc(${at} * var(--row))`;
          const [from, to] = [stepShare(beganAt(alarm)), stepShare(alarm.recovered ?? last)];
          const rule = alarm.recovered == null ? el('div', {class: 'rule', style: `left:${100 * from}%`}) : null;
          const span = el('div', {class: 'span', style: `top:${top};left:${100 * from}%;width:${100 * (to - from)}%`});
          const mark = el(
            'button',
            {
              type: 'button',
              class: `mark${alarm.recovered == null ? '' : ' recovered'}`,
              style: `top:${top};left:${100 * stepShare(alarm.step)}%`,
              'data-testid': 'timeline-alarm',
              title: alarm.message,
              'aria-label': `Alarm at step ${alarm.step}: ${alarm.message}`,
              onclick: () => chooseAlarm(alarm),
            },
            alarm.recovered == null ? '▲' : '△',
          );
          return [rule, span, mark].filter(Boolean);
        }),
      ),
    );
  }

  stepAt(event) {
    return stepBelow(event, this.area);
  }

  read(event) {
    const area = this.area.getBoundingClientRect();
    if (event.buttons) goTo(this.stepAt(event));
    const row =
      this.rows[
        Math.min(
          this.rows.length - 1,
          Math.max(0, Math.floor(((event.clientY - area.top) / area.height) * this.rows.length)),
        )
      ];
    const at = nearest(row.steps, this.stepAt(event));
    const deviation = row.values[at];
    const level = deviation == null ? 'no level to compare with' : `${formatted(deviation)} σ from its usual level`;
    const what = row.series
      ? `${row.series.name}: ${formatted(row.monitor.values[row.series.name]?.[at])}, ${level}`
      : `${row.name}, worst series: ${level}`;
    this.readout.textContent = `step ${row.steps[at]}, ${what}`;
    point(row.names);
  }

  showLegend() {
    const hatched = el(
      'span',
      {class: 'scale'},
      el('span', {class: 'scale-bar hatched', 'aria-hidden': 'true'}),
      'no level yet. ▲: alarm. Click to jump to a step.',
    );
    this.readout.replaceChildren(
      scaleBar('heat', 'as usual', '20 σ or more', 'from the usual level of the series;'),
      ' ',
      hatched,
    );
  }

  move() {
    this.line.style.left = `${100 * stepShare(currentStep())}%`;
  }

  mark() {
    const names = highlighted();
    const at = this.rows.findIndex((row) => row.series && names.includes(row.series.name));
    this.box.hidden = at < 0;
    this.box.style.top = `calc(${Math.max(0, at)} * var(--row))`;
    for (const row of this.rows) row.label.classList.toggle('on', !!row.series && names.includes(row.series.name));
    this.element.dataset.highlight = this.rows
      .filter((row) => row.series && names.includes(row.series.name))
      .map((row) => row.series.name)
      .join(', ');
  }
}

/** The name of the monitor distinguishes two of one diagnostic. */
function labelOf(name, diagnostic) {
  const isOnly = monitors().filter(([, one]) => one.diagnostic === diagnostic).length < 2;
  return isOnly ? titleOf(name, diagnostic) : `${titleOf(name, diagnostic)} (${name})`;
}
