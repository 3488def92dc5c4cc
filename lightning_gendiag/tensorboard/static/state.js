// What the page shows at the moment, and who is notified when it changes.

import {ORDER} from './titles.js';

export const state = {
  runs: [],
  run: null, // name of the run
  data: null, // reply of the route `run`
  compare: null, // name of the run it is compared with
  other: null, // its reply
  steps: [], // of all evaluations and frames, ascending
  position: 0, // of the slider, in `steps`
  follow: true, // stay at the newest step
  playing: false,
  alarm: null, // the alarm that was chosen
  chosen: [], // names of series that stay highlighted
  pointed: [], // names of series under the pointer or the keyboard focus
};

const listeners = {};

/** Topics: runs, run (its data), step, highlight, compare, theme. */
export function on(topic, listener) {
  (listeners[topic] ??= []).push(listener);
}

export function emit(topic) {
  for (const listener of listeners[topic] ?? []) listener();
}

export const currentStep = () => state.steps[state.position] ?? 0;

export const highlighted = () => (state.pointed.length ? state.pointed : state.chosen);

const same = (a, b) => a.length === b.length && a.every((name, i) => name === b[i]);

export function point(names) {
  if (same(names, state.pointed)) return;
  state.pointed = names;
  emit('highlight');
}

/** Keeps the series highlighted, or lets go of them where they already are. */
export function choose(names) {
  state.chosen = same(names, state.chosen) ? [] : names;
  state.alarm = null;
  state.pointed = [];
  emit('highlight');
}

export function chooseAlarm(alarm, jump = true) {
  state.alarm = alarm;
  state.chosen = namesOf(alarm);
  state.pointed = [];
  emit('highlight');
  if (jump) goTo(alarm.step);
}

export function setPosition(position) {
  const last = state.steps.length - 1;
  const next = Math.max(0, Math.min(last, position));
  state.follow = next === last;
  if (next === state.position) return;
  state.position = next;
  emit('step');
}

/** Moves to the evaluation nearest to `step`. */
export function goTo(step) {
  setPosition(nearest(state.steps, step));
}

/** Returns the position of the last of ascending `steps` that is at most `step`, or -1. */
export function atOrBefore(steps, step) {
  let low = 0;
  let high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

export function nearest(steps, step) {
  const before = Math.max(0, atOrBefore(steps, step));
  const after = Math.min(before + 1, steps.length - 1);
  return step - steps[before] <= steps[after] - step ? before : after;
}

/** Returns the step of the frame that is shown at `step`: the newest one up to it, else the first. */
export function frameStep(monitor, step) {
  return monitor.frames?.[Math.max(0, atOrBefore(monitor.frames, step))];
}

export function valueAt(monitor, name, step) {
  return monitor.values[name]?.[atOrBefore(monitor.steps, step)] ?? null;
}

export function extraAt(monitor, name, step) {
  return monitor.extra?.[name]?.[atOrBefore(monitor.steps, step)] ?? null;
}

export const alarms = () => state.data?.report?.alarms ?? [];

export const namesOf = (alarm) => (alarm.names?.length ? alarm.names : [alarm.label]);

export const beganAt = (alarm) => Math.min(alarm.since ?? alarm.step, alarm.step);

/** Returns the alarms of a monitor, in the order in which they were raised. */
export const alarmsOf = (monitor) => alarms().filter((alarm) => alarm.diagnostic === monitor);

/** Returns the names of a monitor's series that are in alarm at `step`. */
export function namesInAlarm(monitor, step) {
  const open = alarmsOf(monitor).filter((a) => beganAt(a) <= step && (a.recovered == null || step < a.recovered));
  return new Set(open.flatMap(namesOf));
}

/** Returns the names and monitors of the run, in the order of their panels. */
export function monitors() {
  const place = ([, monitor]) =>
    ORDER.includes(monitor.diagnostic) ? ORDER.indexOf(monitor.diagnostic) : ORDER.length;
  return Object.entries(state.data?.monitors ?? {}).sort((a, b) => place(a) - place(b));
}

/** Returns the series with one of the given roles. */
export const withRole = (monitor, ...roles) => (monitor.series ?? []).filter((one) => roles.includes(one.role));

/** Returns the same monitor of the run that is compared. */
export const twin = (name) => state.other?.monitors?.[name] ?? null;

export function stepsOf(data) {
  const all = new Set();
  for (const monitor of Object.values(data?.monitors ?? {})) {
    for (const step of monitor.steps ?? []) all.add(step);
    for (const step of monitor.frames ?? []) all.add(step);
  }
  return [...all].sort((a, b) => a - b);
}

export function epochAt(step) {
  let epoch = null;
  for (const [, monitor] of monitors()) {
    const at = monitor.epochs?.[atOrBefore(monitor.steps, step)];
    if (at != null && (epoch == null || at > epoch)) epoch = at;
  }
  return epoch;
}
