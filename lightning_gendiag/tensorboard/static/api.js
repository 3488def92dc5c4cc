// Requests to the plugin's routes. All URLs are relative to the base that TensorBoard sets, so path prefixes work.

const MOST_FRAMES = 300;
const frames = new Map();

async function get(route, parameters = {}) {
  let reply;
  try {
    reply = await fetch(`./${route}?${new URLSearchParams(parameters)}`);
  } catch {
    throw new Error('TensorBoard does not answer. Check that it still runs.');
  }
  if (!reply.ok) throw new Error(`TensorBoard answered ${reply.status}: ${(await reply.text()).trim().slice(0, 300)}`);
  return reply.json();
}

export const getRuns = () => get('runs');

export const getRun = (run) => get('run', {run});

/** Returns the frame of a monitor that was written at `step`; frames that were seen are kept. */
export function getFrame(run, monitor, step) {
  const key = JSON.stringify([run, monitor, step]);
  if (!frames.has(key)) {
    const reply = get('frame', {run, monitor, step});
    reply.catch(() => frames.delete(key));
    frames.set(key, reply);
    if (frames.size > MOST_FRAMES) frames.delete(frames.keys().next().value);
  }
  return frames.get(key);
}

/** Drops the frames of all runs: a resumed run writes other ones at the same steps. */
export function forgetFrames() {
  frames.clear();
}

export const pictureUrl = (picture) => `./${picture.url}`;

let plotly = null;

/** Resolves to Plotly, which is loaded when the first chart is drawn; rejects with a sentence where it is missing. */
export function getPlotly() {
  plotly ??= new Promise((resolve, reject) => {
    const script = document.createElement('script');
    script.src = './plotly.min.js';
    script.onload = () => resolve(globalThis.Plotly);
    script.onerror = () =>
      reject(new Error('Curves need Plotly. Install it by pip install "lightning_gendiag[tab]" and reload the page.'));
    document.head.append(script);
  });
  return plotly;
}
