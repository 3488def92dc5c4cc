// Elements and texts. Everything that comes from a run becomes a text node or an attribute, never markup.

const SVG = 'http://www.w3.org/2000/svg';

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value == null || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

export function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

let lastId = 0;

/** Returns an id for an element that a label names. */
export function freshId() {
  return `gendiag-${++lastId}`;
}

/** Returns one of several choices, of which one holds; `group` is the same for all of them. */
export function choice(group, value, words, attributes) {
  return el('label', {}, el('input', {type: 'radio', name: group, value, ...attributes}), words);
}

/** Returns text that Plotly shows as it is; it reads some markup and templates in names, titles and hover texts. */
export function plotlyText(text) {
  const entities = {'&': '&amp;', '<': '&lt;', '>': '&gt;', '%': '&#37;', $: '&#36;'};
  return String(text).replace(/[&<>%$]/g, (character) => entities[character]);
}

export function formatted(value) {
  if (value == null || !Number.isFinite(value)) return 'no value';
  const size = Math.abs(value);
  if (size === 0) return '0';
  if (size >= 10000 || size < 0.001) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}

export function counted(count, thing) {
  return `${count} ${thing}${count === 1 ? '' : 's'}`;
}

/** Returns words as a list for people: "a, b and c". */
export function listed(words) {
  return words.length < 2 ? words.join('') : `${words.slice(0, -1).join(', ')} and ${words.at(-1)}`;
}

/** Calls `action` with the newest arguments once the calls pause for `delay` milliseconds. */
export function debounced(action, delay) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...values), delay);
  };
}
