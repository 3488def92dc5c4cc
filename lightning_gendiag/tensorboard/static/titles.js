// Words for the diagnostics, in the order of their panels.

export const DIAGNOSTICS = {
  CosineMeanSimilarity: ['Regions', 'Similarity of generated to real images in each region; 1 is equal.'],
  GenerationBalance: ['Classes', 'Shares of the classes among generated images.'],
  ManifoldEntropy: ['Dimensions: entropy', 'How far each latent dimension moves the data.'],
  PosteriorKL: [
    'Dimensions: posterior KL',
    'How far the posterior of each latent dimension is from the prior; 0 is unused.',
  ],
  Adversary: ['Discriminator', 'Why the generator of a GAN stalls: how real, held-out and generated images are told apart.'],
  CodebookUsage: ['Codebook', 'How many codes a quantizer would use if it used all evenly.'],
  TimestepLoss: ['Noise levels', 'The loss of a diffusion or flow matching model in bands of noise levels.'],
  KStar: ['k*', 'Whether the latent space keeps classes together: 1 is together, 0 is scattered.'],
  LatentRegions: ['Latent regions', 'Clusters of the latents and the areas between them.'],
  RoundTrip: ['Round trip', 'What of data and latents is lost when they are encoded and decoded; 0 is nothing.'],
  RegionalPrimitives: ['Primitives', 'Components of the generator and the regions they draw.'],
  Memorization: [
    'Memorization',
    'Whether samples copy training images. Closeness: how far a sample is from its nearest one, relative to how far that is from others.',
  ],
  TrainingData: ['Training data', ''],
};

/** Returns what a series is of, with its unit, which some quantities name already. */
export function quantityOf({quantity, unit} = {}) {
  if (!quantity) return 'value';
  return !unit || quantity.endsWith(` in ${unit}`) ? quantity : `${quantity} in ${unit}`;
}

export const ORDER = Object.keys(DIAGNOSTICS);

export function titleOf(name, diagnostic) {
  return DIAGNOSTICS[diagnostic]?.[0] ?? name;
}
