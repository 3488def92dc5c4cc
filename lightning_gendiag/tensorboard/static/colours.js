// Colours that colour-blind people can distinguish, and scales for the light and the dark theme.

// Okabe and Ito, extended, in the order of the panels in the stock tabs; yellow is darker, as lines on white need it.
const PALETTE = [
  '#0072b2',
  '#e69f00',
  '#009e73',
  '#cc79a7',
  '#56b4e9',
  '#d55e00',
  '#c8b400',
  '#7f7f7f',
  '#9467bd',
  '#17becf',
  '#a5a622',
  '#8c564b',
];
const DISTINCT = 8;
const DASHES = ['solid', 'dot', 'dashdot', 'longdashdot'];

// the first blue is too dark on a dark page
const FIRST_ON_DARK = '#1f8ad6';

export function colourOf(index) {
  const place = (index ?? 7) % PALETTE.length;
  return place === 0 && isDark() ? FIRST_ON_DARK : PALETTE[place];
}

/** Colours beyond eight are hard to tell apart, so the lines differ in their dashes as well. */
export const dashOf = (index) => DASHES[Math.floor((index ?? 0) / DISTINCT) % DASHES.length];

export function channels(colour) {
  return [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
}

export const isDark = () => document.body.classList.contains('dark');

const SCALES = {
  heat: {
    light: [
      [243, 243, 240],
      [253, 212, 158],
      [239, 101, 72],
      [127, 0, 0],
    ],
    dark: [
      [66, 66, 66],
      [140, 60, 30],
      [240, 130, 50],
      [255, 240, 190],
    ],
  },
  amount: {
    light: [
      [247, 249, 251],
      [166, 206, 227],
      [43, 130, 185],
      [8, 48, 107],
    ],
    dark: [
      [58, 60, 64],
      [30, 80, 130],
      [70, 160, 215],
      [220, 240, 255],
    ],
  },
  change: {
    light: [
      [166, 66, 0],
      [233, 150, 80],
      [245, 245, 243],
      [110, 175, 220],
      [0, 84, 140],
    ],
    dark: [
      [255, 160, 80],
      [160, 90, 40],
      [66, 66, 66],
      [40, 100, 150],
      [110, 190, 250],
    ],
  },
};

/** Returns the colour of a share from 0 to 1 of a scale: heat (how bad), amount, or change (below, as usual, above). */
export function scaled(scale, share) {
  const stops = SCALES[scale][isDark() ? 'dark' : 'light'];
  const place = Math.max(0, Math.min(1, share)) * (stops.length - 1);
  const low = Math.min(stops.length - 2, Math.floor(place));
  return stops[low].map((channel, i) => channel + (place - low) * (stops[low + 1][i] - channel));
}

export const css = (rgb) => `rgb(${rgb.map(Math.round).join(' ')})`;

export function gradient(scale) {
  return `linear-gradient(to right, ${[0, 0.25, 0.5, 0.75, 1].map((share) => css(scaled(scale, share))).join(', ')})`;
}

/** The share of a distance in standard deviations on the logarithmic scale from 1 to 1000. */
export const distanceShare = (distance) => Math.log10(Math.max(1, distance)) / 3;

export const variable = (name) => getComputedStyle(document.body).getPropertyValue(name).trim();
