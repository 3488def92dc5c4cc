// How far each value of a series lies from the usual level of that series.

import {alarms, beganAt, namesOf} from './state.js';

const WINDOW = 12;
const LEAST = 6;
const USUAL = 4;
const DARKEST = 20;

const median = (values) => [...values].sort((a, b) => a - b)[values.length >> 1];

/** Returns the newest level, and the spread by the steps from value to value, so that a series that improves has a small one. */
function levelOf(values, usual) {
  const middle = median(values.slice(-LEAST));
  const spread = (1.4826 / Math.SQRT2) * median(values.slice(1).map((value, i) => Math.abs(value - values[i])));
  return {middle, spread: Math.max(spread, usual ?? 0.005 * Math.abs(middle), 1e-9)};
}

/** Returns the values of a series so that larger is worse, or null where it is not known which way is worse. */
function upwards(monitor, series) {
  const values = monitor.values[series.name] ?? [];
  if (series.worse === 'severe') return monitor.severities[series.name];
  if (series.worse === 'down') return values.map((value) => (value == null ? null : -value));
  return series.worse === 'up' ? values : null;
}

/**
 * Returns the deviations from the level of the preceding values, in standard deviations; null without a value or a level.
 * Values during an alarm do not change the level, so that what stays bad keeps its colour.
 */
function deviations(values, inAlarm, isOneSided, usual) {
  const recent = [];
  let level = null;
  return values.map((value, i) => {
    if (value == null) return null;
    if (!inAlarm[i] && recent.length >= LEAST) level = levelOf(recent, usual);
    const change = level && (value - level.middle) / level.spread;
    if (!inAlarm[i]) {
      recent.push(value);
      if (recent.length > WINDOW) recent.shift();
    }
    return level && (isOneSided ? Math.max(0, change) : Math.abs(change));
  });
}

/** Whether an alarm is about a series, about one of its components, or names it as changed as well. */
function concerns(alarm, monitor, series) {
  if (alarm.also_changed?.includes(`${monitor}: ${series.name}`)) return true;
  return alarm.diagnostic === monitor && (series.role === 'aggregate' || namesOf(alarm).includes(series.name));
}

/** Returns a monitor's deviations: an object with one list for each series. */
export function severities(name, monitor) {
  const result = {};
  for (const series of monitor.series) {
    const about = alarms().filter((alarm) => concerns(alarm, name, series));
    const inAlarm = monitor.steps.map((step) =>
      about.some((alarm) => beganAt(alarm) <= step && (alarm.recovered == null || step < alarm.recovered)),
    );
    const judged = upwards(monitor, series);
    const values = judged ?? monitor.values[series.name] ?? [];
    result[series.name] = deviations(values, inAlarm, judged != null, judged && series.min_std);
  }
  return result;
}

/** The share on the colour scale, which is logarithmic from what is usual to what is darkest. */
export const severityShare = (deviation) =>
  deviation <= USUAL ? 0 : Math.min(1, 0.25 + 0.75 * (Math.log(deviation / USUAL) / Math.log(DARKEST / USUAL)));
