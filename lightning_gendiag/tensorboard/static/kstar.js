// k*: whether a latent space keeps classes together, and which ones run into each other.

import {Curves, Matrix, scaleBar} from './charts.js';
import {el, formatted} from './dom.js';
import {Legend, Panel, titled} from './panel.js';
import {state} from './state.js';

export class KStar extends Panel {
  build() {
    this.histogram = new Matrix('Distribution of k* in each class', {
      columnWord: 'k*, from 0 (scattered) to 1 (together)',
      width: 300,
      height: 230,
    });
    this.rivals = new Matrix('First rivals of each class', {
      columnWord: 'class of its nearest foreign neighbours',
      width: 230,
    });
    this.curves = new Curves('Mean k* of each class over steps', 210);
    this.legend = new Legend(this);
    this.curvesTitle = el('h3');
    this.histogramBlock = titled('Distribution in each class', this.histogram.element);
    this.rivalsBlock = titled('First rivals of each class', this.rivals.element);
    for (const block of [this.histogramBlock, this.rivalsBlock]) block.hidden = !this.monitor.frames?.length;
    this.body.classList.add('three', 'wide-last');
    this.body.append(
      this.histogramBlock,
      this.rivalsBlock,
      el('div', {class: 'block'}, this.curvesTitle, this.curves.element, this.legend.element),
    );
  }

  draw() {
    const series = this.components;
    this.curvesTitle.textContent = `Mean k* of each class over steps${state.other ? `; dashed: ${state.compare}` : ''}`;
    this.curves.show(this.curvesOf(series), this.alarmMarks());
    this.legend.draw(series);
  }

  move() {
    this.curves.move();
    this.legend.move();
  }

  mark() {
    for (const part of [this.curves, this.legend, this.histogram, this.rivals]) part.mark();
  }

  showFrame(frame) {
    const {histogram, rivals} = frame.arrays ?? {};
    const nameOf = new Map(this.components.map((one) => [one.index, one.name]));
    const names = (frame.classes ?? []).map((c) => nameOf.get(c) ?? `class ${c}`);
    this.histogramBlock.hidden = !histogram;
    this.rivalsBlock.hidden = !rivals;
    if (histogram) this.showHistogram(frame, names, histogram);
    if (rivals) this.showRivals(frame, names, rivals);
  }

  showHistogram(frame, names, cells) {
    const bins = cells[0]?.length ?? 0;
    const most = cells.map((line) => Math.max(1e-9, ...line.map((value) => value ?? 0)));
    const pattern = (row) => (frame.patterns?.[row] ? `${names[row]} (${frame.patterns[row]})` : names[row]);
    this.histogram.show({
      rows: names,
      columns: Array.from({length: bins}, (_, i) => formatted((i + 1) / bins)),
      cells,
      scale: 'amount',
      share: (value, row) => value / most[row],
      legend: el('span', {}, `Dark: many samples of the class, step ${frame.step}`),
      text: (row, column) =>
        `${pattern(row)}, k* from ${formatted(column / bins)} to ${formatted((column + 1) / bins)}: ${formatted(cells[row][column])}`,
      namesAt: (row) => [names[row]],
    });
  }

  showRivals(frame, names, cells) {
    this.rivals.show({
      rows: names,
      columns: names,
      cells,
      scale: 'heat',
      share: (value) => value,
      legend: scaleBar('heat', '0', '1', `share, step ${frame.step}`),
      text: (row, column) => `${names[row]} runs into ${names[column]}: ${formatted(cells[row][column])}`,
      namesAt: (row) => [names[row]],
    });
  }
}
