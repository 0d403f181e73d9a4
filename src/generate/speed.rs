//! How fast generation was, against what limits it.

use std::fmt;
use std::time::Duration;

/// Tokens and times of one or more calls of [`super::generate`].
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Speed {
    /// Tokens of all prompts, padding not counted.
    pub prompt_tokens: usize,
    /// Time to read them.
    pub prefill: Duration,
    /// Tokens produced; the first of each sequence comes from the prompt.
    pub new_tokens: usize,
    /// Decode steps: each reads every weight once.
    pub steps: usize,
    /// Time of the decode steps, choosing the tokens included.
    pub decode: Duration,
}

impl Speed {
    /// Adds the tokens and times of another call.
    pub fn add(&mut self, other: &Speed) {
        self.prompt_tokens += other.prompt_tokens;
        self.prefill += other.prefill;
        self.new_tokens += other.new_tokens;
        self.steps += other.steps;
        self.decode += other.decode;
    }

    /// Tokens of prompts per second.
    pub fn prompt_tokens_per_second(&self) -> f64 {
        rate(self.prompt_tokens as f64, self.prefill)
    }

    /// New tokens per second of decoding.
    pub fn tokens_per_second(&self) -> f64 {
        rate(self.new_tokens as f64, self.decode)
    }

    /// Bytes of weights read per second of decoding, for a model of `weight_bytes`: decoding one sequence is limited by the
    /// bandwidth of the memory that holds the weights. The KV cache is not counted.
    pub fn weight_bytes_per_second(&self, weight_bytes: usize) -> f64 {
        rate(weight_bytes as f64 * self.steps as f64, self.decode)
    }

    /// Two lines for a person, for a model of `weight_bytes`.
    pub fn report(&self, weight_bytes: usize) -> String {
        format!(
            "{self}\ndecode steps: {} x {:.3} GB of weights = {:.2} GB/s",
            self.steps,
            weight_bytes as f64 / 1e9,
            self.weight_bytes_per_second(weight_bytes) / 1e9
        )
    }
}

impl fmt::Display for Speed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "prompts: {} tokens, {:.1} tokens/s; answers: {} tokens, {:.1} tokens/s",
            self.prompt_tokens,
            self.prompt_tokens_per_second(),
            self.new_tokens,
            self.tokens_per_second()
        )
    }
}

fn rate(amount: f64, time: Duration) -> f64 {
    if time.is_zero() {
        0.0
    } else {
        amount / time.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_amounts_over_times() {
        let second = Duration::from_secs(1);
        let mut speed = Speed {
            prompt_tokens: 30,
            prefill: second,
            new_tokens: 8,
            steps: 4,
            decode: second,
        };
        assert_eq!(speed.weight_bytes_per_second(1_000), 4_000.0);
        speed.add(&speed.clone());
        assert_eq!(
            (speed.prompt_tokens_per_second(), speed.tokens_per_second()),
            (30.0, 8.0)
        );
        assert_eq!(Speed::default().tokens_per_second(), 0.0);
    }
}
