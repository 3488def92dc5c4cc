// How far each value of a series lies from the usual level of that series.

import {alarmsOf, beganAt, namesOf, withRole} from './state.js';

const WINDOW = 16;
const LEAST = 6;
const LOWER_IS_WORSE = new Set(['CosineMeanSimilarity', 'KStar']);

const median = (values) => [...values].sort((a, b) => a - b)[values.length >> 1];

function levelOf(values) {
  const middle = median(values);
  const spread = 1.4826 * median(values.map((value) => Math.abs(value - middle)));
  return {middle, spread: Math.max(spread, 0.005 * Math.abs(middle), 1e-9)};
}

/**
 * Returns the deviations from the level of the preceding values, in standard deviations; null without a value or a level.
 * Values during an alarm do not change the level, so that what stays bad keeps its colour.
 */
function deviations(values, inAlarm, isOneSided) {
  const recent = [];
  let level = null;
  return values.map((value, i) => {
    if (value == null) return null;
    if (!inAlarm[i] && recent.length >= LEAST) level = levelOf(recent);
    const change = level && (value - level.middle) / level.spread;
    if (!inAlarm[i]) {
      recent.push(value);
      if (recent.length > WINDOW) recent.shift();
    }
    return level && (isOneSided ? Math.max(0, -change) : Math.abs(change));
  });
}

/** Returns a monitor's deviations: an object with one list for each series. */
export function severities(name, monitor) {
  const own = alarmsOf(name);
  const directed = new Set(withRole(monitor, 'component', 'aggregate').map((one) => one.name));
  const result = {};
  for (const series of monitor.series) {
    const about = own.filter((alarm) => namesOf(alarm).includes(series.name));
    const inAlarm = monitor.steps.map((step) =>
      about.some((alarm) => beganAt(alarm) <= step && (alarm.recovered == null || step < alarm.recovered)),
    );
    const isOneSided = LOWER_IS_WORSE.has(monitor.diagnostic) && directed.has(series.name);
    result[series.name] = deviations(monitor.values[series.name] ?? [], inAlarm, isOneSided);
  }
  return result;
}

/** The share on the colour scale: up to 3 standard deviations is usual, 20 is the darkest. */
export const severityShare = (deviation) =>
  deviation <= 3 ? 0 : Math.min(1, 0.25 + 0.75 * (Math.log(deviation / 3) / Math.log(20 / 3)));
