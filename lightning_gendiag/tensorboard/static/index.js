// The page of the tab GenDiag. TensorBoard imports this module and calls `render`.

import {forgetFrames, getPlotly, getRun, getRuns} from './api.js';
import {Classes} from './classes.js';
import {Codebook} from './codebook.js';
import {Dimensions} from './dimensions.js';
import {el, listed} from './dom.js';
import {Head} from './head.js';
import {KStar} from './kstar.js';
import {Latents} from './latents.js';
import {Memorization} from './memorization.js';
import {Panels} from './panel.js';
import {Primitives} from './primitives.js';
import {Regions} from './regions.js';
import {Report} from './report.js';
import {SeriesPanel} from './series.js';
import {alarms, chooseAlarm, currentStep, emit, monitors, nearest, on, state, stepsOf, withRole} from './state.js';
import {Timeline} from './timeline.js';
import {DIAGNOSTICS, ORDER, titleOf} from './titles.js';
import {Wipe, withPictures} from './wipe.js';

const POLL = 5000;
const WORST_FIRST = ['unhealthy', 'getting worse'];
const PANELS = {
  CosineMeanSimilarity: Regions,
  GenerationBalance: Classes,
  ManifoldEntropy: Dimensions,
  PosteriorKL: Dimensions,
  CodebookUsage: Codebook,
  KStar,
  Memorization,
  LatentRegions: Latents,
  RegionalPrimitives: Primitives,
};
const BY_PARTS = new Set(['GenerationBalance', 'ManifoldEntropy', 'PosteriorKL', 'KStar']);
const NARROW = new Set(['LatentRegions', 'RegionalPrimitives', 'TrainingData']);

let wanted, wantedOther; // the runs that were picked last, perhaps not loaded yet
let head, report, timeline, panels, note, missing, main;

function build() {
  document.head.append(el('link', {rel: 'stylesheet', href: './style.css'}));
  document.documentElement.lang = 'en';
  head = new Head({
    pickRun: (run) => {
      wanted = run;
      if (run !== state.run) attempt(() => openRun(run));
    },
    pickCompare: (run) => attempt(() => compareWith(run)),
  });
  report = new Report();
  timeline = new Timeline();
  note = el('p', {class: 'note', role: 'status', 'data-testid': 'note', hidden: true});
  missing = el('p', {class: 'faint', 'data-testid': 'missing'});
  const container = el('div', {class: 'panels'});
  panels = new Panels(container);
  main = el('main', {hidden: true}, report.element, timeline.element, container, missing);
  document.body.append(el('div', {class: 'top'}, head.element, note), main);
  on('step', () => everywhere('move'));
  on('highlight', () => everywhere('mark'));
  on('theme', redraw);
  on('compare', () => panels.update('draw'));
  document.addEventListener('keydown', (event) => head.key(event));
}

function everywhere(change) {
  if (!state.data) return;
  if (change === 'draw') report.draw();
  else report[change]();
  timeline[change]();
  panels.update(change);
}

/** Draws everything anew in the colours of the theme. */
function redraw() {
  if (!state.data) return;
  panels.set(createPanels());
  report.draw();
  timeline.draw();
}

/** Runs an action; what fails is shown in words, and the page goes on. */
async function attempt(action) {
  try {
    await action();
    tell(state.note);
  } catch (error) {
    tell(action === reload ? `${error.message} The page tries again every ${POLL / 1000} seconds.` : error.message);
  }
}

let reloading; // the reload that is under way

/** Takes in what has been written since; one at a time, so that no older reply replaces a newer one. */
function reload() {
  reloading ??= reloaded().finally(() => (reloading = null));
  return reloading;
}

function tell(words) {
  note.textContent = words ?? '';
  note.hidden = !words;
}

async function reloaded() {
  const {runs, note: words} = await getRuns();
  state.runs = runs;
  state.note = runs.length ? words : 'No run below the log directory has records of lightning_gendiag yet.';
  emit('runs');
  if (!runs.length) return;
  if (!runs.some((one) => one.run === state.run)) await openRun(mostUrgent(runs).run);
  else if (isOutdated(state.run, state.data)) await refreshRun();
  if (state.compare == null) return;
  if (!runs.some((one) => one.run === state.compare)) await compareWith(null);
  else if (isOutdated(state.compare, state.other)) await compareWith(state.compare);
}

const isOutdated = (run, data) => state.runs.find((one) => one.run === run)?.version !== data?.version;

/** Returns the data of a run, without gaps where records or fields are missing, and with a place in the palette for each series. */
async function load(run) {
  const data = await getRun(run);
  for (const [name, monitor] of Object.entries(data.monitors)) {
    const whole = {setup: {}, steps: [], epochs: [], values: {}, extra: {}, frames: [], ...monitor};
    // an aggregate is grey
    whole.series = (monitor.series ?? []).map((one, i) => ({
      ...one,
      place: one.index ?? (one.role === 'aggregate' ? null : i),
    }));
    data.monitors[name] = whole;
  }
  return data;
}

/** The newest run among those in the worst state. */
function mostUrgent(runs) {
  const last = (word) => runs.findLast((one) => one.state === word);
  return WORST_FIRST.map(last).find(Boolean) ?? runs.at(-1);
}

async function openRun(run) {
  wanted = run;
  const data = await load(run);
  if (wanted !== run) return; // another one was picked meanwhile
  Object.assign(state, {run, data, steps: stepsOf(data), alarm: null, chosen: [], pointed: [], follow: true});
  state.position = Math.max(0, state.steps.length - 1);
  if (state.compare === run) Object.assign(state, {compare: null, other: null});
  main.hidden = false;
  panels.set(createPanels());
  emit('run');
  report.draw();
  timeline.draw();
  chooseFirstAlarm();
}

/** Highlights what the most serious open alarm is about, so that the page shows it at first sight. */
function chooseFirstAlarm() {
  const open = alarms().filter((one) => one.recovered == null);
  const first = open.findLast((one) => one.is_critical) ?? open.at(-1);
  if (first) chooseAlarm(first, false);
}

/** Takes in what a live run has written since, and keeps what the user has set. */
async function refreshRun() {
  const {run, data: old} = state;
  const data = await load(run);
  if (state.run !== run) return;
  const step = currentStep();
  const steps = stepsOf(data);
  forgetFrames();
  const chosen = state.alarm;
  Object.assign(state, {data, steps, position: state.follow ? Math.max(0, steps.length - 1) : nearest(steps, step)});
  state.alarm = chosen && (alarms().find((one) => one.step === chosen.step && one.label === chosen.label) ?? null);
  if (shapeOf(old) !== shapeOf(data)) panels.set(createPanels());
  emit('run');
  everywhere('draw');
  if (state.follow && !state.chosen.length) chooseFirstAlarm();
}

/** Two replies with the same shape are shown by the same panels. */
const shapeOf = (data) =>
  JSON.stringify(
    Object.entries(data.monitors).map(([name, {diagnostic, series, setup, frames}]) => [
      name,
      diagnostic,
      series,
      setup?.labels,
      frames?.length > 0,
    ]),
  );

async function compareWith(run) {
  wantedOther = run;
  if (run == null && state.compare == null) return;
  const data = run == null ? null : await load(run);
  if (wantedOther !== run) return; // another one was picked meanwhile
  Object.assign(state, {compare: run, other: data});
  emit('compare');
}

function createPanels() {
  const absent = ORDER.filter((diagnostic) => !monitors().some(([, one]) => one.diagnostic === diagnostic));
  missing.textContent = absent.length
    ? `Not in this run: ${listed(absent.map((diagnostic) => titleOf('', diagnostic).toLowerCase()))}.`
    : '';
  const created = monitors().map(([name, monitor]) => {
    const hasParts = !BY_PARTS.has(monitor.diagnostic) || withRole(monitor, 'component').length > 0;
    const panel = new (hasParts && PANELS[monitor.diagnostic] ? PANELS[monitor.diagnostic] : SeriesPanel)(
      name,
      titleOf(name, monitor.diagnostic),
      DIAGNOSTICS[monitor.diagnostic]?.[1],
    );
    panel.element.classList.toggle('narrow', NARROW.has(monitor.diagnostic));
    return panel;
  });
  const narrow = created.filter((panel) => panel.element.classList.contains('narrow'));
  if (narrow.length % 2) narrow.at(-1).element.classList.remove('narrow'); // it would leave half a row empty
  if (withPictures().length) created.push(new Wipe());
  return created;
}

/** Follows the theme of TensorBoard around the frame, else that of the system. */
function followTheme() {
  const system = matchMedia('(prefers-color-scheme: dark)');
  let host = null;
  try {
    host = window.parent === window ? null : window.parent.document.body;
  } catch {
    // TensorBoard is on another origin, as in some notebooks
  }
  const apply = () => {
    const isDark = host ? host.classList.contains('dark-mode') : system.matches;
    if (document.body.classList.contains('dark') === isDark) return;
    document.body.classList.toggle('dark', isDark);
    emit('theme');
  };
  if (host) new MutationObserver(apply).observe(host, {attributes: true, attributeFilter: ['class']});
  else system.addEventListener('change', apply);
  apply();
}

/** Reloads when TensorBoard does: this is the protocol that its own library for plugins speaks. */
function followTensorBoard() {
  const channel = new MessageChannel();
  channel.port1.onmessage = (message) => {
    const {type, id, isReply} = JSON.parse(message.data);
    if (isReply) return;
    channel.port1.postMessage(JSON.stringify({type, id, payload: null, error: null, isReply: true}));
    if (type === 'experimental.DataReloaded' || type === 'experimental.RunsChanged') attempt(reload);
  };
  window.parent.postMessage('experimental.bootstrap', '*', [channel.port2]);
}

/** TensorBoard keeps the frame of a tab that is not shown, without a size. */
const isShown = () => !document.hidden && window.innerHeight > 0;

export async function render() {
  build();
  followTheme();
  followTensorBoard();
  getPlotly().catch(() => {}); // loads while the data are on their way; the charts say it where it is missing
  await attempt(reload);
  setInterval(() => isShown() && attempt(reload), POLL);
}
