// Codebooks: which codes a quantizer uses, at the step and over all steps.

import {Curves, Heat, Matrix, scaleBar} from './charts.js';
import {counted, el, formatted, listed} from './dom.js';
import {Legend, Panel} from './panel.js';
import {currentStep, extraAt, state, withRole} from './state.js';

const FAINTEST = 0.06; // of the scale, for codes that are hardly chosen, so that those that are never chosen stand out

export class Codebook extends Panel {
  build() {
    this.heat = new Heat('Use of the codes over steps', 230);
    this.matrix = new Matrix('Use of each code', {width: 230, columnWord: ''});
    this.curves = new Curves('Perplexity over steps', 190);
    this.legend = new Legend(this);
    this.curvesTitle = el('h3');
    this.cellsTitle = el('h3', {'data-testid': 'codes-title'});
    this.died = el('p', {class: 'verdict', 'data-testid': 'codes-died'});
    this.cells = el('div', {class: 'block'}, this.cellsTitle, this.matrix.element, this.died);
    this.cells.hidden = !this.monitor.frames.length;
    this.body.classList.add('three', 'wide-first');
    this.body.append(
      el('div', {class: 'block'}, el('h3', {}, 'Use of the codes over steps'), this.heat.element),
      this.cells,
      el('div', {class: 'block'}, this.curvesTitle, this.curves.element, this.legend.element),
    );
  }

  draw() {
    const {steps, setup, extra} = this.monitor;
    const rows = setup.rows ?? [];
    this.heat.show({
      names: rows.map((bins) => this.nameOf(...bins)),
      steps,
      values: rows.map((_, row) => (extra.use ?? []).map((line) => line?.[row] ?? null)),
      scale: 'change',
      share: shareOf,
      legend: scaleBar('change', 'never', 'ten times', 'as often as in even use'),
    });
    const series = withRole(this.monitor, 'aggregate', 'component');
    this.curvesTitle.textContent = `Perplexity: codes in even use${state.other ? `; dashed: ${state.compare}` : ''}`;
    this.curves.show(this.curvesOf(series), this.alarmMarks());
    this.legend.draw(series);
  }

  /** The name of the codes from `first` to `last` of a codebook. */
  nameOf(codebook, first, last) {
    const codes = first === last ? `${first}` : `${first}–${last}`;
    return this.sizes.length > 1 ? `${codebook}: ${codes}` : codes;
  }

  get sizes() {
    return this.monitor.setup.sizes ?? [];
  }

  move() {
    const seen = extraAt(this.monitor, 'seen', currentStep()) ?? [];
    const parts = seen.map((number, q) => `${number} of ${this.sizes[q]}${this.sizes.length > 1 ? ` (${q})` : ''}`);
    this.cellsTitle.textContent = parts.length ? `Codes used at step ${currentStep()}: ${parts.join(', ')}` : '';
    this.heat.move();
    this.curves.move();
    this.legend.move();
  }

  mark() {
    for (const part of [this.heat, this.matrix, this.curves, this.legend]) part.mark();
  }

  showFrame(frame) {
    const {use, died} = frame.arrays ?? {};
    this.cells.hidden = !use?.length;
    if (!use?.length) return;
    const group = frame.codes ?? 1;
    const alone = this.sizes.length < 2;
    const columns = use[0].length;
    const last = (first, q) => Math.min(first + group, this.sizes[q]) - 1;
    const codesAt = (row, column) => {
      const first = group * (alone ? row * columns + column : column);
      return `${group > 1 ? 'codes' : 'code'} ${this.nameOf(alone ? 0 : row, first, last(first, alone ? 0 : row))}`;
    };
    this.matrix.show({
      rows: use.map((_, row) => (alone ? String(row * columns * group) : `codebook ${row}`)),
      columns: use[0].map((_, column) => String(column * group)),
      cells: use,
      scale: 'change',
      share: shareOf,
      legend: el('span', {}, `One cell for ${group > 1 ? counted(group, 'code') : 'each code'}, step ${frame.step}`),
      text: (row, column) =>
        use[row][column] == null
          ? 'no code'
          : `${codesAt(row, column)}: ${formatted(use[row][column])} times even use${died?.[row]?.[column] ? ', died' : ''}`,
      namesAt: (row) => (alone ? [] : [`codebook ${row}`]),
    });
    const names = (frame.died ?? []).map(([q, code]) => (alone ? `${code}` : `${code} of codebook ${q}`));
    const more = (frame.num_died ?? 0) - names.length;
    if (more > 0) names.push(`${more} more`);
    const dead = frame.dead ? `${counted(frame.dead, 'code')} never chosen` : 'All codes are chosen';
    this.died.textContent = names.length ? `${dead}; died: ${listed(names)}` : dead;
    this.died.classList.toggle('in-alarm', names.length > 0);
  }
}

/** Places a use relative to an even one on a logarithmic scale from a tenth to ten times. */
const shareOf = (use) => (use > 0 ? Math.max(FAINTEST, Math.min(1, (1 + Math.log10(use)) / 2)) : 0);
