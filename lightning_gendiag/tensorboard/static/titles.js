// Words for the diagnostics, in the order of their panels.

export const DIAGNOSTICS = {
  CosineMeanSimilarity: ['Regions', 'Similarity of generated to real images in each region; 1 is equal.'],
  GenerationBalance: ['Classes', 'Shares of the classes among generated images.'],
  ManifoldEntropy: ['Latent dimensions: entropy', 'How far each dimension moves the data.'],
  PosteriorKL: ['Latent dimensions: posterior KL', 'How much the encoder tells each dimension.'],
  KStar: ['k*: classes in the latent space', '1: the class lies together and apart from others; 0: it is scattered.'],
  LatentRegions: ['Latent regions', ''],
  RegionalPrimitives: ['Primitives', 'Components of the generator, and the regions they draw.'],
  TrainingData: ['Training data', ''],
};

export function titleOf(name, diagnostic) {
  return DIAGNOSTICS[diagnostic]?.[0] ?? name;
}
