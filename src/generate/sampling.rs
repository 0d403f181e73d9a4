//! From one row of logits to one token: logits processors and warpers as transformers 4.30 defines them.
//!
//! Order: repetition penalty, no-repeat n-gram (both also when greedy), then temperature, top-k, top-p, softmax. A removed
//! token has the logit `-inf`, so it keeps probability 0 whatever follows.

use crate::error::Result;
use crate::rng::Stream;

use super::GenerationConfig;

/// Marks the random streams of sampling ("sample"), so that they differ from those of training with the same seed.
pub const STREAM: u64 = 0x7361_6d70_0000_0000;

/// Turns logits into tokens; keeps its buffers from step to step.
#[derive(Debug)]
pub struct Sampler {
    config: GenerationConfig,
    scores: Vec<f32>,
    order: Vec<u32>,
    spare: Vec<f32>,
}

impl Sampler {
    /// A sampler for `config`.
    ///
    /// # Errors
    /// A value out of range.
    pub fn new(config: &GenerationConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            config: config.clone(),
            scores: Vec::new(),
            order: Vec::new(),
            spare: Vec::new(),
        })
    }

    /// The next token after `history` (prompt and answer so far, without padding), whose logits are finite.
    ///
    /// Sampling inverts the cumulative distribution in the order of token ids at a 53-bit uniform number made of the words
    /// `2 position` and `2 position + 1` of `stream`: token `position` of an answer is a function of seed, stream and logits.
    pub fn next(&mut self, logits: &[f32], history: &[u32], stream: Stream, position: u64) -> u32 {
        if !self.config.do_sample {
            self.process(logits, history);
            return argmax(&self.scores);
        }
        self.probabilities(logits, history);
        let high = u64::from(stream.bits(2 * position));
        let low = u64::from(stream.bits(2 * position + 1));
        let uniform = ((high << 32 | low) >> 11) as f64 / (1u64 << 53) as f64;
        inverse_cdf(&self.scores, uniform)
    }

    /// The probabilities, `[V]`, that sampling draws from.
    pub fn probabilities(&mut self, logits: &[f32], history: &[u32]) -> &[f32] {
        self.process(logits, history);
        let Self {
            config,
            scores,
            order,
            spare,
        } = self;
        if config.temperature != 1.0 {
            let temperature = config.temperature as f32;
            scores.iter_mut().for_each(|score| *score /= temperature);
        }
        if config.top_k > 0 {
            top_k(scores, config.top_k, spare);
        }
        if config.top_p < 1.0 {
            top_p(scores, config.top_p, order, spare);
        }
        softmax(scores);
        scores
    }

    fn process(&mut self, logits: &[f32], history: &[u32]) {
        self.scores.clear();
        self.scores.extend_from_slice(logits);
        if self.config.repetition_penalty != 1.0 {
            repetition_penalty(
                &mut self.scores,
                logits,
                history,
                self.config.repetition_penalty as f32,
            );
        }
        if self.config.no_repeat_ngram_size > 0 {
            no_repeat_ngram(&mut self.scores, history, self.config.no_repeat_ngram_size);
        }
    }
}

/// The index of the largest score, the first of equals, as `torch.argmax` on the CPU.
pub fn argmax(scores: &[f32]) -> u32 {
    let mut best = 0;
    for (id, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = id;
        }
    }
    best as u32
}

/// `score < 0 ? score * penalty : score / penalty` for every token of `history`, once however often it occurs: each result
/// is computed from the untouched `logits`.
fn repetition_penalty(scores: &mut [f32], logits: &[f32], history: &[u32], penalty: f32) {
    for &id in history {
        if let Some(&logit) = logits.get(id as usize) {
            scores[id as usize] = if logit < 0.0 {
                logit * penalty
            } else {
                logit / penalty
            };
        }
    }
}

/// Forbids each token that followed an earlier occurrence of the last `n - 1` tokens.
fn no_repeat_ngram(scores: &mut [f32], history: &[u32], n: usize) {
    if history.len() + 1 < n {
        return;
    }
    let prefix = &history[history.len() + 1 - n..];
    for ngram in history.windows(n) {
        if ngram[..n - 1] == *prefix
            && let Some(score) = scores.get_mut(ngram[n - 1] as usize)
        {
            *score = f32::NEG_INFINITY;
        }
    }
}

/// Removes what is below the k-th largest score; equals of it stay.
fn top_k(scores: &mut [f32], k: usize, spare: &mut Vec<f32>) {
    if k >= scores.len() {
        return;
    }
    spare.clear();
    spare.extend_from_slice(scores);
    let (_, &mut threshold, _) = spare.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    for score in scores.iter_mut() {
        if *score < threshold {
            *score = f32::NEG_INFINITY;
        }
    }
}

/// Removes, from the least probable upwards, every token whose cumulative probability is at most `1 - p`; the most probable
/// one stays. Among equals the lower ids go first (a stable ascending sort).
///
/// The cumulative sum is carried in f64 and rounded to f32 at every element, as `torch.cumsum` does on the CPU.
fn top_p(scores: &mut [f32], p: f64, order: &mut Vec<u32>, spare: &mut Vec<f32>) {
    order.clear();
    order.extend((0..scores.len() as u32).filter(|&id| scores[id as usize] > f32::NEG_INFINITY));
    order.sort_by(|&a, &b| scores[a as usize].total_cmp(&scores[b as usize]));
    spare.clear();
    spare.extend(order.iter().map(|&id| scores[id as usize]));
    softmax(spare);
    let bound = (1.0 - p) as f32;
    let mut cumulative = 0.0f64;
    let removable = order.len().saturating_sub(1);
    for (&id, &probability) in order[..removable].iter().zip(spare.iter()) {
        cumulative += f64::from(probability);
        if cumulative as f32 > bound {
            break;
        }
        scores[id as usize] = f32::NEG_INFINITY;
    }
}

/// `exp(x - max) / sum`, in place; the sum is carried in f64. `-inf` becomes 0.
fn softmax(scores: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        // Every token is forbidden (n-grams over a tiny vocabulary): all are equally (im)probable.
        let equal = 1.0 / scores.len() as f32;
        scores.fill(equal);
        return;
    }
    let mut sum = 0.0f64;
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
        sum += f64::from(*score);
    }
    let sum = sum as f32;
    scores.iter_mut().for_each(|score| *score /= sum);
}

/// The first id at which the cumulative probability exceeds `uniform` (in `[0, 1)`) of the total.
fn inverse_cdf(probabilities: &[f32], uniform: f64) -> u32 {
    let total: f64 = probabilities.iter().map(|&p| f64::from(p)).sum();
    let target = uniform * total;
    let mut cumulative = 0.0;
    let mut last = 0;
    for (id, &p) in probabilities.iter().enumerate() {
        if p > 0.0 {
            cumulative += f64::from(p);
            last = id;
            if cumulative > target {
                break;
            }
        }
    }
    last as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain() -> GenerationConfig {
        GenerationConfig {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            ..GenerationConfig::default()
        }
    }

    fn kept(config: GenerationConfig, logits: &[f32], history: &[u32]) -> Vec<usize> {
        let mut sampler = Sampler::new(&config).unwrap();
        let p = sampler.probabilities(logits, history);
        assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        (0..p.len()).filter(|&i| p[i] > 0.0).collect()
    }

    #[test]
    fn top_k_keeps_ties_and_top_p_cuts_them() {
        let logits = [1.0, 3.0, 2.0, 2.0, -1.0];
        assert_eq!(
            kept(GenerationConfig { top_k: 2, ..plain() }, &logits, &[]),
            [1, 2, 3]
        );
        assert_eq!(
            kept(GenerationConfig { top_k: 9, ..plain() }, &logits, &[]),
            [0, 1, 2, 3, 4]
        );
        // Four equal tokens of 1/4: the ascending sums are 0.25, 0.5, ...; at most 1 - 0.5 is removed.
        assert_eq!(
            kept(
                GenerationConfig {
                    top_p: 0.5,
                    ..plain()
                },
                &[0.0; 4],
                &[]
            ),
            [2, 3]
        );
        assert_eq!(
            kept(
                GenerationConfig {
                    top_p: 0.0,
                    ..plain()
                },
                &[0.0; 4],
                &[]
            ),
            [3]
        );
    }

    #[test]
    fn the_repetition_penalty_counts_a_token_once() {
        let config = GenerationConfig {
            repetition_penalty: 2.0,
            ..plain()
        };
        let mut sampler = Sampler::new(&config).unwrap();
        sampler.process(&[4.0, -1.0, 0.5], &[0, 0, 1, 0]);
        assert_eq!(sampler.scores, [2.0, -2.0, 0.5]);
    }

    #[test]
    fn repeated_ngrams_are_forbidden() {
        let config = GenerationConfig {
            no_repeat_ngram_size: 3,
            ..plain()
        };
        assert_eq!(
            kept(config.clone(), &[0.0; 6], &[1, 2, 3, 1, 2, 4, 1, 2]),
            [0, 1, 2, 5]
        );
        assert_eq!(kept(config, &[0.0; 6], &[1]), [0, 1, 2, 3, 4, 5]);
        let unigrams = GenerationConfig {
            no_repeat_ngram_size: 1,
            ..plain()
        };
        assert_eq!(kept(unigrams, &[0.0; 3], &[1, 1]), [0, 2]);
    }

    #[test]
    fn greedy_takes_the_first_of_equals_and_heeds_processors_only() {
        assert_eq!(argmax(&[0.0, 2.0, 2.0]), 1);
        let config = GenerationConfig {
            do_sample: false,
            repetition_penalty: 4.0,
            ..GenerationConfig::default()
        };
        let mut sampler = Sampler::new(&config).unwrap();
        assert_eq!(sampler.next(&[1.0, 2.0, 0.0], &[1], Stream::new(0, 0), 0), 0);
    }

    #[test]
    fn frequencies_are_the_probabilities_and_the_seed_decides() {
        let logits: Vec<f32> = [0.1f32, 0.2, 0.3, 0.4].iter().map(|p| p.ln()).collect();
        let mut sampler = Sampler::new(&plain()).unwrap();
        let n = 20_000;
        let mut counts = [0.0; 4];
        for position in 0..n {
            counts[sampler.next(&logits, &[], Stream::new(1, 2), position) as usize] += 1.0 / n as f64;
        }
        for (count, p) in counts.iter().zip([0.1, 0.2, 0.3, 0.4]) {
            assert!((count - p).abs() < 0.015, "{counts:?}");
        }
        let draw = |sampler: &mut Sampler, seed| -> Vec<u32> {
            (0..30)
                .map(|position| sampler.next(&logits, &[], Stream::new(seed, 2), position))
                .collect()
        };
        assert_eq!(draw(&mut sampler, 5), draw(&mut sampler, 5));
        assert_ne!(draw(&mut sampler, 5), draw(&mut sampler, 6));
    }

    #[test]
    fn the_ends_of_the_distribution_are_reached_and_nothing_beyond() {
        assert_eq!(inverse_cdf(&[0.0, 0.5, 0.5, 0.0], 0.0), 1);
        assert_eq!(inverse_cdf(&[0.0, 0.5, 0.5, 0.0], 1.0 - f64::EPSILON), 2);
    }
}
