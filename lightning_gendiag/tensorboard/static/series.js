// Curves of all series of a monitor: one chart for each quantity.

import {Curves} from './charts.js';
import {el} from './dom.js';
import {Legend, Panel} from './panel.js';
import {state} from './state.js';
import {quantityOf} from './titles.js';

const MOST_CHARTS = 6;
const MOST_CURVES = 12;

/** Charts of series, one for each quantity. */
export class OtherSeries {
  constructor(panel) {
    this.panel = panel;
    this.element = el('div', {class: 'charts'});
  }

  draw(series) {
    const groups = grouped(series);
    const key = JSON.stringify([...groups].map(([axis, list]) => [axis, list.map((one) => one.name)]));
    if (key !== this.key) this.build(groups);
    this.key = key;
    for (const {list, curves, legend} of this.charts) {
      curves.show(this.panel.curvesOf(list), this.panel.alarmMarks());
      legend.draw(list);
    }
  }

  build(groups) {
    this.charts = [...groups].slice(0, MOST_CHARTS).map(([axis, list]) => {
      const shown = list.slice(0, MOST_CURVES);
      return {
        title: el('h3', {}, axis[0].toUpperCase() + axis.slice(1)),
        list: shown,
        hidden: list.length - shown.length,
        curves: new Curves(`${axis} over steps`, 160),
        legend: new Legend(this.panel),
      };
    });
    const left = [...groups].slice(MOST_CHARTS).map(([axis]) => axis);
    this.element.replaceChildren(
      ...this.charts.map(({title, curves, legend, hidden}) =>
        el(
          'div',
          {class: 'block'},
          title,
          curves.element,
          legend.element,
          hidden ? el('p', {class: 'faint'}, `${hidden} more are in the tab Scalars.`) : null,
        ),
      ),
    );
    if (left.length) this.element.append(el('p', {class: 'faint'}, `Also in the tab Scalars: ${left.join(', ')}.`));
  }

  move() {
    for (const {curves, legend} of this.charts) {
      curves.move();
      legend.move();
    }
  }

  mark() {
    for (const {curves, legend} of this.charts) {
      curves.mark();
      legend.mark();
    }
  }
}

function grouped(series) {
  const groups = new Map();
  for (const one of series) groups.set(quantityOf(one), [...(groups.get(quantityOf(one)) ?? []), one]);
  return groups;
}

/** The panel of training data, and of diagnostics that the page does not know. */
export class SeriesPanel extends Panel {
  showsFrames = false;

  build() {
    this.charts = new OtherSeries(this);
    this.note = el('p', {class: 'faint'});
    this.body.append(this.charts.element, this.note);
  }

  draw() {
    this.charts.draw(this.monitor.series);
    this.note.textContent = state.other ? `Dashed: ${state.compare}` : '';
  }

  move() {
    this.charts.move();
  }

  mark() {
    this.charts.mark();
  }
}
