//! What the user sees of a run: a bar on a terminal, plain lines elsewhere. Everything goes to stderr.

use super::LossScale;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// The numbers of one finished step.
#[derive(Debug, Clone, Copy)]
pub struct StepLine {
    /// The optimizer step, from 1.
    pub step: u64,
    /// Epochs done.
    pub epoch: f64,
    /// Loss of the step.
    pub loss: f64,
    /// Learning rate used.
    pub learning_rate: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Loss scaling, in fp16.
    pub loss_scale: Option<LossScale>,
    /// Tokens per second, padding not counted, of late.
    pub tokens_per_second: f64,
}

/// Reports the progress of `total` steps.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    started: Instant,
    first: u64,
    total: u64,
    /// Plain lines are held back to one per this long, but for the first and the last.
    pause: Duration,
    last_line: Option<Instant>,
}

impl Progress {
    /// Begins at step `first` (0, or the step resumed from) of `total`.
    pub fn new(first: u64, total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total).with_position(first);
            let style = ProgressStyle::with_template("{bar:28} {pos}/{len} {msg}")
                .unwrap_or_else(|e| panic!("the template is valid: {e}"));
            bar.set_style(style);
            bar
        });
        let pause = Duration::from_secs(1);
        Self {
            bar,
            started: Instant::now(),
            first,
            total,
            pause,
            last_line: None,
        }
    }

    /// Reports a finished step.
    pub fn step(&mut self, line: &StepLine) {
        let done = line.step.saturating_sub(self.first).max(1);
        let left = self
            .started
            .elapsed()
            .div_f64(done as f64)
            .mul_f64(self.total.saturating_sub(line.step) as f64);
        let scale = line.loss_scale.map_or(String::new(), |s| {
            format!("  scale {} ({} overflows)", s.scale, s.overflows)
        });
        let text = format!(
            "loss {:.4}  lr {:.2e}{scale}  {:.0} tokens/s  {} left",
            line.loss,
            line.learning_rate,
            line.tokens_per_second,
            clock(left)
        );
        if let Some(bar) = &self.bar {
            bar.set_message(text);
            bar.set_position(line.step);
            return;
        }
        let ends = line.step == self.first + 1 || line.step == self.total;
        if ends || self.last_line.is_none_or(|last| last.elapsed() >= self.pause) {
            self.last_line = Some(Instant::now());
            eprintln!(
                "step {}/{}  epoch {:.2}  {text}",
                line.step, self.total, line.epoch
            );
        }
    }

    /// Prints a line without disturbing the bar.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    /// Leaves the bar as it is and ends the line.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}

/// `1:02:03`, or `2:03` below an hour.
pub fn clock(duration: Duration) -> String {
    let s = duration.as_secs();
    let (hours, minutes, seconds) = (s / 3600, s / 60 % 60, s % 60);
    if hours > 0 {
        format!("{hours}:{minutes:02}:{seconds:02}")
    } else {
        format!("{minutes}:{seconds:02}")
    }
}

/// Says every two seconds how far a pass over the weights has come: the progress of
/// [`crate::checkpoint::quantized::open_or_quantize`].
pub fn preparing_weights() -> impl FnMut(u64, u64, &str) {
    let mut last = Instant::now();
    move |done, total, what| {
        if last.elapsed() >= Duration::from_secs(2) {
            last = Instant::now();
            eprintln!(
                "preparing the 4-bit weights: {} % ({what})",
                done * 100 / total.max(1)
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_reads_as_a_clock() {
        assert_eq!(clock(Duration::from_secs(3)), "0:03");
        assert_eq!(clock(Duration::from_secs(3723)), "1:02:03");
    }
}
