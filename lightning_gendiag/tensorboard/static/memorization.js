// Memorization: how many samples copy a training image, and what the closest ones look like beside it.

import {pictureUrl} from './api.js';
import {Curves} from './charts.js';
import {colourOf} from './colours.js';
import {el, formatted} from './dom.js';
import {Legend, Panel, Picture} from './panel.js';
import {currentStep, extraAt, state} from './state.js';

const SHARES = ['copies', 'repeats'];
const REAL = 7; // the place of grey in the palette
const BOUNDS = {name: '', colour: colourOf(REAL), isBound: true};

export class Memorization extends Panel {
  build() {
    this.verdict = el('p', {class: 'verdict', 'data-testid': 'copies-verdict'});
    this.curves = new Curves('Share of samples that copy a training image, over steps', 190);
    this.legend = new Legend(this);
    this.pairs = new Pairs('Samples above their nearest training images', 'copies');
    this.twins = new Pairs('Samples that are alike', 'twins');
    this.title = el('h3');
    this.frameBlock = el('div', {class: 'block'}, this.pairs.element, this.twins.element);
    this.frameBlock.hidden = !this.monitor.frames.length;
    this.body.classList.add('two');
    this.body.append(
      el('div', {class: 'block'}, this.verdict, this.title, this.curves.element, this.legend.element),
      this.frameBlock,
    );
  }

  draw() {
    const {monitor} = this;
    const shares = monitor.series.filter((one) => SHARES.includes(one.name));
    this.title.textContent = `Share of samples over steps; band: its interval; dotted: real images${state.other ? `; dashed: ${state.compare}` : ''}`;
    this.curves.show([...this.realCurves(), ...this.curvesOf(shares)], this.alarmMarks());
    this.legend.draw(shares);
  }

  /** The interval of the share of copies as a band, and the share of real images that would count as such. */
  realCurves() {
    const {steps, extra} = this.monitor;
    const bound = (name, place) => (extra[name] ?? []).map((values) => values?.[place] ?? null);
    const band = colourOf(this.monitor.series.find((one) => one.name === 'copies')?.place);
    return [
      {...BOUNDS, steps, values: bound('interval', 0)},
      {...BOUNDS, steps, values: bound('interval', 1), fill: band},
      {name: 'real images', steps, values: bound('real', 0), colour: colourOf(REAL), dash: 'dot'},
    ];
  }

  move() {
    const [low] = extraAt(this.monitor, 'interval', currentStep()) ?? [];
    const [, , most] = extraAt(this.monitor, 'real', currentStep()) ?? [];
    const isCopying = low != null && most != null && low > most;
    this.verdict.textContent = this.sentence(isCopying);
    this.verdict.classList.toggle('in-alarm', isCopying);
    this.curves.move();
    this.legend.move();
  }

  sentence(isCopying) {
    const share = this.monitor.values.copies?.[this.place];
    const [real] = extraAt(this.monitor, 'real', currentStep()) ?? [];
    const [images, held] = extraAt(this.monitor, 'images', currentStep()) ?? [];
    if (share == null) return 'Nothing can be compared at this step.';
    const beside = real == null ? '' : `; of fresh real images ${percent(real)} would count as copies`;
    return isCopying
      ? `${percent(share)} of the samples copy ${images} of the ${held} training images held${beside}.`
      : `No sign of copies: ${percent(share)} of the samples${beside}.`;
  }

  get place() {
    return this.monitor.steps.findLastIndex((step) => step <= currentStep());
  }

  mark() {
    this.curves.mark();
    this.legend.mark();
  }

  showFrame(frame) {
    this.frameBlock.hidden = false;
    const {ratio = 0} = this.monitor.setup;
    const closeness = frame.closeness ?? [];
    const captions = closeness.map((value, i) => ({
      words: `no. ${frame.numbers?.[i]}, ${value == null ? 'no value' : Number(value.toPrecision(2))}`,
      isCopy: value != null && value < ratio,
    }));
    const copies = captions.filter((one) => one.isCopy).length;
    this.pairs.show(
      frame.pictures?.copies,
      `Step ${frame.step}: closest samples above their training images; ${copies || 'none'} of ${captions.length} below ${ratio}`,
      captions,
    );
    this.twins.show(frame.pictures?.twins, `Step ${frame.step}: samples that are alike, above each other`, []);
  }
}

/** A picture of two rows: images above the ones that they are closest to, with a caption below each pair. */
class Pairs {
  constructor(words, testid) {
    this.picture = new Picture(words, {'data-testid': testid});
    this.captions = el('ol', {class: 'captions'});
    this.element = this.picture.element;
    this.element.classList.add('pairs');
    this.element.append(this.captions);
  }

  /** Shows the picture, if there is one; captions are {words, isCopy}. */
  show(picture, caption, captions) {
    this.element.hidden = !picture;
    if (!picture) return;
    this.picture.show(pictureUrl(picture), caption);
    this.element.style.setProperty('--columns', Math.round((2 * picture.width) / picture.height));
    this.captions.replaceChildren(
      ...captions.map(({words, isCopy}) => el('li', {class: isCopy ? 'in-alarm' : null, title: words}, words)),
    );
  }
}

const percent = (share) => `${formatted(100 * share)} %`;
