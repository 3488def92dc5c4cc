// Regions of images: where generated images differ from real ones, and since when.

import {getFrame, pictureUrl} from './api.js';
import {Curves, scaleBar} from './charts.js';
import {channels, colourOf, distanceShare, isDark, scaled} from './colours.js';
import {choice, el, formatted, freshId, svg} from './dom.js';
import {Legend, Panel, Picture} from './panel.js';
import {
  alarmsOf,
  atOrBefore,
  beganAt,
  choose,
  currentStep,
  extraAt,
  frameStep,
  highlighted,
  point,
  state,
  valueAt,
  withRole,
} from './state.js';
import {quantityOf} from './titles.js';

export class Regions extends Panel {
  build() {
    const {setup} = this.monitor;
    this.labels = setup.labels ?? null;
    this.mapMode = 'region';
    this.real = new Picture('Mean of real images');
    this.before = new Picture('Generated before');
    this.generated = new Picture('Mean of generated images', {'data-testid': 'mean-generated'});
    this.realSamples = new Picture('Real images');
    this.samples = new Picture('Generated images', {'data-testid': 'samples'});
    this.samples.image.classList.add('grid');
    this.realSamples.image.classList.add('grid');
    this.curves = new Curves('Similarity of each region over steps', 265);
    this.legend = new Legend(this, (series) => this.entryText(series));
    this.curvesTitle = el('h3');
    const pictures = el('div', {class: 'tiles'}, this.real.element, this.before.element, this.generated.element);
    if (this.labels) {
      this.outlines = [this.real, this.before, this.generated].map((picture) => this.outlined(picture.stack));
      pictures.append(this.mapFigure());
    }
    const hasDistance = this.labels && this.monitor.extra?.distance?.some((one) => one);
    this.looks = el(
      'div',
      {class: 'looks'},
      pictures,
      hasDistance ? this.mapOptions() : null,
      el('div', {class: 'pair'}, this.realSamples.element, this.samples.element),
    );
    this.body.append(
      this.looks,
      el('div', {class: 'block'}, this.curvesTitle, this.legend.element, this.curves.element),
    );
  }

  mapFigure() {
    this.canvas = el('canvas', {
      role: 'img',
      'data-testid': 'region-map',
      'aria-label': 'Map of the regions',
      width: this.labels[0].length,
      height: this.labels.length,
    });
    const stack = el('div', {class: 'stack'}, this.canvas);
    this.outlines.push(this.outlined(stack));
    return el('figure', {}, el('figcaption', {}, 'Map of the regions'), stack);
  }

  mapOptions() {
    this.scale = el('span', {class: 'map-scale'});
    const group = freshId();
    const option = (mode, words) =>
      choice(group, mode, words, {
        checked: mode === this.mapMode,
        'data-testid': `map-${mode}`,
        onchange: () => {
          this.mapMode = mode;
          this.paintMap();
        },
      });
    return el(
      'div',
      {class: 'options', role: 'radiogroup', 'aria-label': 'Colours of the map'},
      'Map coloured',
      option('region', 'by region'),
      option('distance', 'by distance from real'),
      this.scale,
    );
  }

  /** Lays the outlines of the regions over a picture; pointing at one highlights it. */
  outlined(stack) {
    const [height, width] = [this.labels.length, this.labels[0].length];
    const borders = bordersOf(this.labels);
    const layer = svg('svg', {
      class: 'outlines',
      viewBox: `0 0 ${width} ${height}`,
      preserveAspectRatio: 'none',
      'aria-hidden': 'true',
    });
    const paths = this.components.map((series) => {
      const d = borders.get(series.index) ?? '';
      const halo = svg('path', {d, class: 'halo'});
      const path = svg('path', {d, class: 'outline', stroke: colourOf(series.place)});
      layer.append(halo, path);
      return {name: series.name, halo, path};
    });
    const nameAt = (event) => {
      const area = layer.getBoundingClientRect();
      const row = Math.floor(((event.clientY - area.top) / area.height) * height);
      const column = Math.floor(((event.clientX - area.left) / area.width) * width);
      const index = this.labels[row]?.[column];
      return this.components.filter((series) => series.index === index).map((series) => series.name);
    };
    stack.addEventListener('pointermove', (event) => point(nameAt(event)));
    stack.addEventListener('pointerleave', () => point([]));
    stack.addEventListener('click', (event) => choose(nameAt(event)));
    stack.append(layer);
    return paths;
  }

  draw() {
    const {setup} = this.monitor;
    const pictures = setup.pictures ?? {};
    const isBare = !this.labels && !Object.keys(pictures).length && !this.monitor.frames.length;
    this.body.classList.toggle('regions', !isBare);
    this.looks.hidden = isBare;
    this.tell(isBare ? 'This run has no pictures and no map of the regions.' : '');
    if (pictures.mean_real) this.real.show(pictureUrl(pictures.mean_real), 'Mean of real images');
    if (pictures.samples_real) this.realSamples.show(pictureUrl(pictures.samples_real), 'Real images');
    const components = this.components;
    const series = components.length ? components : this.monitor.series;
    const quantity = quantityOf(series[0]);
    this.curvesTitle.textContent = `${quantity[0].toUpperCase()}${quantity.slice(1)} of each region${state.other ? `; dashed: ${state.compare}` : ''}`;
    this.curves.show(
      this.curvesOf([...series, ...withRole(this.monitor, 'aggregate').filter((one) => !series.includes(one))]),
      this.alarmMarks(),
    );
    this.legend.draw([...components, ...withRole(this.monitor, 'aggregate')]);
  }

  move() {
    this.curves.move();
    this.legend.move();
    this.paintMap();
    this.showBefore();
  }

  mark() {
    this.curves.mark();
    this.legend.mark();
    this.paintMap();
    const names = highlighted();
    const inAlarm = this.inAlarm();
    for (const {name, halo, path} of (this.outlines ?? []).flat()) {
      const isStrong = names.includes(name);
      path.classList.toggle('strong', isStrong);
      path.classList.toggle('alarmed', inAlarm.has(name));
      halo.classList.toggle('shown', isStrong || inAlarm.has(name));
    }
  }

  showFrame(frame) {
    const {mean_generated: mean, samples} = frame.pictures ?? {};
    this.generated.element.hidden = !mean;
    this.samples.element.hidden = !samples;
    if (mean) this.generated.show(pictureUrl(mean), `Generated, step ${frame.step}`);
    if (samples) this.samples.show(pictureUrl(samples), `Generated images, step ${frame.step}`);
  }

  /** Shows the last picture from before the newest alarm that began up to the step. */
  async showBefore() {
    const alarm = alarmsOf(this.name)
      .filter((one) => beganAt(one) <= currentStep())
      .at(-1);
    const at = alarm ? atOrBefore(this.monitor.frames, beganAt(alarm) - 1) : -1;
    this.before.element.hidden = at < 0 || frameStep(this.monitor, currentStep()) <= this.monitor.frames[at];
    if (this.before.element.hidden) return;
    try {
      const frame = await getFrame(state.run, this.name, this.monitor.frames[at]);
      if (frame.pictures?.mean_generated)
        this.before.show(pictureUrl(frame.pictures.mean_generated), `Before, step ${frame.step}`);
    } catch {
      this.before.element.hidden = true;
    }
  }

  entryText(series) {
    const value = formatted(valueAt(this.monitor, series.name, currentStep()));
    const distance =
      series.role === 'component' ? extraAt(this.monitor, 'distance', currentStep())?.[series.index] : null;
    return distance == null ? value : `${value}, ${formatted(distance)} σ`;
  }

  paintMap() {
    if (!this.canvas) return;
    const distances = extraAt(this.monitor, 'distance', currentStep()) ?? [];
    const names = highlighted();
    const isAny = this.components.some((series) => names.includes(series.name));
    const ground = isDark() ? 48 : 255;
    const byIndex = new Map(
      this.components.map((series) => {
        const distance = distances[series.index];
        const full =
          this.mapMode === 'region'
            ? channels(colourOf(series.place))
            : distance == null
              ? [128, 128, 128]
              : scaled('heat', distanceShare(distance));
        const strength = this.mapMode === 'region' && isAny && !names.includes(series.name) ? 0.3 : 1;
        return [series.index, full.map((channel) => ground + strength * (channel - ground))];
      }),
    );
    const key = `${this.mapMode} ${isDark()} ${[...byIndex.values()].join()}`;
    if (key === this.painted) return;
    this.painted = key;
    const context = this.canvas.getContext('2d');
    const pixels = context.createImageData(this.canvas.width, this.canvas.height);
    this.labels.flat().forEach((label, i) => pixels.data.set([...(byIndex.get(label) ?? [128, 128, 128]), 255], 4 * i));
    context.putImageData(pixels, 0, 0);
    this.scale?.replaceChildren(...(this.mapMode === 'distance' ? [scaleBar('heat', '1 σ', '1000 σ')] : []));
  }
}

/** Returns the borders of each label as the data of an SVG path. */
function bordersOf(labels) {
  const paths = new Map();
  const add = (label, text) => paths.set(label, (paths.get(label) ?? '') + text);
  labels.forEach((line, row) =>
    line.forEach((label, column) => {
      if (labels[row - 1]?.[column] !== label) add(label, `M${column} ${row}h1`);
      if (labels[row + 1]?.[column] !== label) add(label, `M${column} ${row + 1}h1`);
      if (line[column - 1] !== label) add(label, `M${column} ${row}v1`);
      if (line[column + 1] !== label) add(label, `M${column + 1} ${row}v1`);
    }),
  );
  return paths;
}
