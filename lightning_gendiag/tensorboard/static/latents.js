// Latent regions: points of a latent space of two or three dimensions, in the colours of their classes.

import {getPlotly} from './api.js';
import {fitted} from './charts.js';
import {colourOf, variable} from './colours.js';
import {el} from './dom.js';
import {Legend, Panel} from './panel.js';
import {OtherSeries} from './series.js';
import {highlighted} from './state.js';

const SHAPES = ['circle', 'square', 'diamond'];
const FAINT = 0.12;

export class Latents extends Panel {
  build() {
    this.plot = el('div', {
      class: 'plot scatter',
      role: 'img',
      'aria-label': 'Points of the latent space',
      'data-testid': 'scatter',
    });
    this.title = el('h3');
    this.series = new OtherSeries(this);
    this.legend = new Legend(this, () => '');
    this.scatterBlock = el('div', {class: 'block'}, this.title, this.plot);
    this.scatterBlock.hidden = !this.monitor.frames.length;
    this.body.classList.add('two');
    this.body.append(this.scatterBlock, el('div', {class: 'block'}, this.legend.element, this.series.element));
  }

  draw() {
    this.series.draw(this.monitor.series);
  }

  move() {
    this.series.move();
  }

  /** Fades the points of other classes than the highlighted ones. */
  mark() {
    this.series.mark();
    if (!this.names) return;
    this.legend.mark();
    const wanted = highlighted().filter((name) => this.names.includes(name));
    if (wanted.join() === this.faded) return;
    this.faded = wanted.join();
    const opacity = this.names.map((name) => (wanted.length && !wanted.includes(name) ? FAINT : 1));
    this.plotly.restyle(this.plot, {'marker.opacity': [opacity]}, [0]);
  }

  async showFrame(frame) {
    const {points, classes, grey, means} = frame.arrays ?? {};
    this.scatterBlock.hidden = !points?.length;
    if (!points?.length) return;
    this.plotly = await getPlotly();
    this.title.textContent = `Latents, step ${frame.step}; open: grey area; ✕: centres`;
    const isSolid = points[0].length > 2;
    const traces = [cloud(points, classes, grey, isSolid)];
    if (means?.length) traces.push(centres(means, isSolid));
    await this.plotly.react(this.plot, traces, this.layout(), {displayModeBar: false});
    if (!this.names) fitted(this.plotly, this.plot);
    this.names = points.map((_, i) => (classes ? `class ${classes[i]}` : ''));
    this.faded = '';
    this.legend.draw(groupsOf(classes).map((group) => ({name: `class ${group}`, place: group})));
    this.mark();
  }

  layout() {
    const axis = {gridcolor: variable('--line'), zerolinecolor: variable('--line'), title: {text: ''}};
    return {
      margin: {l: 34, r: 8, t: 8, b: 28},
      paper_bgcolor: 'rgba(0,0,0,0)',
      plot_bgcolor: 'rgba(0,0,0,0)',
      showlegend: false,
      uirevision: this.name,
      font: {color: variable('--fg'), size: 11},
      xaxis: {...axis, constrain: 'domain'},
      yaxis: {...axis, scaleanchor: 'x', constrain: 'domain'},
      scene: {xaxis: axis, yaxis: axis, zaxis: axis},
    };
  }
}

const groupsOf = (classes) => [...new Set(classes ?? [])].sort((a, b) => a - b);

const coordinates = (points, isSolid) => ({
  type: isSolid ? 'scatter3d' : 'scatter',
  mode: 'markers',
  x: points.map((one) => one[0]),
  y: points.map((one) => one[1]),
  ...(isSolid ? {z: points.map((one) => one[2])} : {}),
});

/** One trace for all points: several would take longer to draw than a move of the slider may. */
function cloud(points, classes, grey, isSolid) {
  const shapeOf = (group) => SHAPES[Math.floor((group ?? 0) / 8) % SHAPES.length];
  return {
    ...coordinates(points, isSolid),
    hoverinfo: 'text',
    text: points.map((_, i) => `${classes ? `class ${classes[i]}` : 'latent'}${grey?.[i] ? ', grey area' : ''}`),
    marker: {
      color: points.map((_, i) => colourOf(classes?.[i] ?? 0)),
      size: isSolid ? 3 : 6,
      symbol: points.map((_, i) => (grey?.[i] ? `${shapeOf(classes?.[i])}-open` : shapeOf(classes?.[i]))),
    },
  };
}

const centres = (means, isSolid) => ({
  ...coordinates(means, isSolid),
  hoverinfo: 'text',
  text: means.map(() => 'centre'),
  marker: {symbol: 'x', size: isSolid ? 5 : 11, color: variable('--fg')},
});
