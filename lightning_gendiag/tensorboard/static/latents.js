// Latent regions: points of a latent space of two or three dimensions, in the colours of their classes.

import {getPlotly} from './api.js';
import {fitted} from './charts.js';
import {colourOf, variable} from './colours.js';
import {el} from './dom.js';
import {Legend, Panel} from './panel.js';
import {OtherSeries} from './series.js';
import {highlighted} from './state.js';

export class Latents extends Panel {
  build() {
    this.plot = el('div', {class: 'plot scatter', role: 'img', 'aria-label': 'Points of the latent space', 'data-testid': 'scatter'});
    this.title = el('h3');
    this.series = new OtherSeries(this);
    this.legend = new Legend(this, () => '');
    this.scatterBlock = el('div', {class: 'block'}, this.title, this.plot);
    this.scatterBlock.hidden = !this.monitor.frames?.length;
    this.body.classList.add('two');
    this.body.append(this.scatterBlock, el('div', {class: 'block'}, this.legend.element, this.series.element));
  }

  draw() {
    this.series.draw(this.monitor.series);
  }

  move() {
    this.series.move();
  }

  mark() {
    this.series.mark();
    if (!this.groups) return;
    this.legend.mark();
    const isOn = (group) => group != null && highlighted().includes(`class ${group}`);
    const isAny = this.groups.some(isOn);
    const opacity = this.groups.map((group) => (isAny && !isOn(group) ? 0.15 : 1));
    if (opacity.join() === this.opacity) return;
    this.opacity = opacity.join();
    this.plotly.restyle(this.plot, {opacity}, this.groups.map((_, i) => i));
  }

  async showFrame(frame) {
    const {points, classes, grey, means} = frame.arrays ?? {};
    this.scatterBlock.hidden = !points?.length;
    if (!points?.length) return;
    this.plotly = await getPlotly();
    this.title.textContent = `Latents, step ${frame.step}; open: grey area; ✕: centres`;
    const ink = variable('--fg');
    const line = variable('--line');
    const axis = {gridcolor: line, zerolinecolor: line, title: {text: ''}};
    const isSolid = points[0].length > 2;
    const groups = classes ? [...new Set(classes)].sort((a, b) => a - b) : [null];
    const traces = groups.map((group) => cloud(points.filter((_, i) => group == null || classes[i] === group),
      grey?.filter((_, i) => group == null || classes[i] === group), group, isSolid));
    if (means) traces.push({...coordinates(means, isSolid), name: 'centre', mode: 'markers', hoverinfo: 'name', marker: {symbol: 'x', size: isSolid ? 5 : 11, color: ink}});
    await this.plotly.react(this.plot, traces, {
      margin: {l: 34, r: 8, t: 8, b: 28}, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', font: {color: ink, size: 11},
      uirevision: this.name, showlegend: false, xaxis: {...axis, constrain: 'domain'}, yaxis: {...axis, scaleanchor: 'x', constrain: 'domain'}, scene: {xaxis: axis, yaxis: axis, zaxis: axis},
    }, {displayModeBar: false});
    if (!this.groups) fitted(this.plotly, this.plot);
    this.legend.draw(groups.filter((group) => group != null).map((group) => ({name: `class ${group}`, place: group})));
    Object.assign(this, {groups, opacity: groups.map(() => 1).join()});
    this.mark();
  }
}

const coordinates = (points, isSolid) => ({
  type: isSolid ? 'scatter3d' : 'scatter', x: points.map((one) => one[0]), y: points.map((one) => one[1]), ...(isSolid ? {z: points.map((one) => one[2])} : {}),
});

function cloud(points, grey, group, isSolid) {
  const shape = ['circle', 'square', 'diamond'][Math.floor((group ?? 0) / 8) % 3];
  return {
    ...coordinates(points, isSolid), mode: 'markers', name: group == null ? 'latents' : `class ${group}`, hoverinfo: 'name',
    marker: {color: colourOf(group ?? 0), size: isSolid ? 3 : 6, symbol: points.map((_, i) => (grey?.[i] ? `${shape}-open` : shape))},
  };
}
