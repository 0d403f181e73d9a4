//! Plans and choices as text.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::fit::{Candidate, Fit};
use super::layout::head_name;
use super::{Plan, Work};
use crate::tensor::ledger::Pool;

fn gb(bytes: u64) -> String {
    format!("{:8.3} GB", bytes as f64 / 1e9)
}

impl Plan {
    /// Every buffer with its bytes, the largest first within each memory.
    pub fn table(&self) -> String {
        let mut text = String::new();
        for pool in Pool::ALL {
            let mut lines: Vec<(&str, u64)> = self
                .lines
                .iter()
                .filter(|line| line.pool == pool)
                .map(|line| (line.account, line.bytes))
                .collect();
            lines.sort_by_key(|&(_, bytes)| std::cmp::Reverse(bytes));
            if pool == Pool::Device {
                lines.extend([
                    ("answers between steps", self.answers),
                    ("more while loading", self.loading),
                    ("scratch of kernels", self.fixed[1]),
                    ("the driver's context (a guess)", self.fixed[0]),
                ]);
            }
            lines.retain(|&(_, bytes)| bytes > 0);
            if lines.is_empty() {
                continue;
            }
            let total: u64 = lines.iter().map(|&(_, bytes)| bytes).sum();
            let _ = writeln!(text, "{:<34}{}", pool.name(), gb(total));
            for (account, bytes) in lines {
                let _ = writeln!(text, "  {account:<32}{}  {bytes:>14}", gb(bytes));
            }
        }
        text
    }
}

impl Candidate {
    /// For `--json`.
    pub fn json(&self) -> Value {
        let Self {
            layout,
            device,
            host,
            cost,
        } = self;
        json!({
            "micro_batch_size": layout.micro_batch,
            "recompute": layout.policies().to_string(),
            "head_storage": head_name(layout.head),
            "stream_weights": layout.stream,
            "optimizer_state": layout.state.name(),
            "optimizer_in_backward": layout.in_backward,
            "device_bytes": device,
            "host_bytes": host,
            "predicted_seconds": cost.total(),
        })
    }

    /// One line: choices, memory, predicted time.
    pub fn line(&self, work: &Work) -> String {
        let seconds = self.cost.total();
        let tokens = (work.batch * work.length) as f64 / seconds;
        format!(
            "{}: {} of the card, {} of the host, {seconds:.2} s a step ({tokens:.0} tokens/s) predicted",
            self.layout,
            gb(self.device).trim_start(),
            gb(self.host).trim_start()
        )
    }
}

impl Fit {
    /// What was chosen and what the alternatives would cost.
    pub fn text(&self, work: &Work, card: &str) -> String {
        let chosen = &self.ladder[0];
        let mut text = format!("chosen for {card}: {}\n", chosen.line(work));
        for (candidate, fits) in &self.alternatives {
            let ratio = candidate.cost.total() / chosen.cost.total();
            let verdict = if *fits { "fits" } else { "does not fit" };
            let _ = writeln!(
                text,
                "  recompute {:<14} {:>5.2} x the time, {} of the card: {verdict}",
                candidate.layout.policies().to_string(),
                ratio,
                gb(candidate.device).trim_start()
            );
        }
        text
    }
}
