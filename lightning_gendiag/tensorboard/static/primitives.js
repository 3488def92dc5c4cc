// Regional primitives: which regions a generator draws together.

import {pictureUrl} from './api.js';
import {el, formatted, svg} from './dom.js';
import {Panel, Picture, titled} from './panel.js';
import {OtherSeries} from './series.js';

export class Primitives extends Panel {
  build() {
    this.strip = new Picture('Largest components', {'data-testid': 'strip'});
    this.strip.image.classList.add('grid');
    this.names = el('ol', {class: 'components'});
    this.line = svg('svg', {
      class: 'norms',
      viewBox: '0 0 100 40',
      preserveAspectRatio: 'none',
      role: 'img',
      'aria-label': 'Norms of the components, largest first',
    });
    this.norms = el('div', {class: 'readout'});
    this.series = new OtherSeries(this);
    this.normsBlock = titled('Norms of the components, largest first', this.line, this.norms);
    this.frameBlock = el('div', {class: 'block'}, this.strip.element, this.names, this.normsBlock);
    this.frameBlock.hidden = !this.monitor.frames?.length;
    this.body.classList.add('two');
    this.body.append(this.frameBlock, this.series.element);
  }

  draw() {
    this.series.draw(this.monitor.series);
  }

  move() {
    this.series.move();
  }

  mark() {
    this.series.mark();
  }

  showFrame(frame) {
    this.frameBlock.hidden = false;
    const strip = frame.pictures?.strip;
    this.strip.element.hidden = !strip;
    if (strip) this.strip.show(pictureUrl(strip), `Largest components, step ${frame.step}`);
    this.names.replaceChildren(...(frame.names ?? []).map((name) => el('li', {}, name)));
    this.drawNorms((frame.arrays?.curve ?? []).filter((value) => value != null));
  }

  drawNorms(values) {
    this.normsBlock.hidden = !values.length;
    const most = Math.max(...values, 1e-9);
    const place = (value, i) => `${(100 * i) / Math.max(1, values.length - 1)},${38 - (36 * value) / most}`;
    this.line.replaceChildren(svg('polyline', {points: values.map(place).join(' ')}));
    this.norms.textContent = values.length
      ? `${values.length} components, from ${formatted(values[0])} to ${formatted(values.at(-1))}`
      : '';
  }
}
