//! What lies where in a run, and what is computed again.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::{EmbeddingPlace, HeadStorage, LayerPolicy, Recompute};

/// Where the state of the optimizer lies, and in full-parameter training the f32 weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StateOn {
    /// Where the model computes.
    #[default]
    Device,
    /// In pages of host memory, which visit the device.
    Host,
    /// In pages of a file.
    Disk,
}

impl StateOn {
    /// The flag's value.
    pub const fn name(self) -> &'static str {
        match self {
            StateOn::Device => "device",
            StateOn::Host => "host",
            StateOn::Disk => "disk",
        }
    }
}

/// The choices that memory depends on. None of them changes a number of the run, but for the head's storage and how a step is cut
/// into micro-batches.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// Sequences of a micro-batch.
    pub micro_batch: usize,
    /// What every layer keeps.
    pub layers: Vec<LayerPolicy>,
    /// The form of the head's matrix.
    pub head: HeadStorage,
    /// The place of the embedding.
    pub embedding: EmbeddingPlace,
    /// Do the layers' matrices stay in host memory?
    pub stream: bool,
    /// The optimizer's state.
    pub state: StateOn,
    /// Bytes of device memory for its pages; `None`: 96 MiB for each kind of state.
    pub optimizer_vram: Option<u64>,
    /// Are layers updated in the backward pass?
    pub in_backward: bool,
}

impl Layout {
    /// Everything where it computes, no product computed again.
    pub fn plain(micro_batch: usize, layers: usize) -> Self {
        Self {
            micro_batch,
            layers: vec![LayerPolicy::default(); layers],
            head: HeadStorage::Compute,
            embedding: EmbeddingPlace::Device,
            stream: false,
            state: StateOn::Device,
            optimizer_vram: None,
            in_backward: false,
        }
    }

    /// Does it change numbers of a run that has another one?
    pub fn rounds_the_head(&self) -> bool {
        matches!(self.head, HeadStorage::Int8 | HeadStorage::Nf4)
    }

    /// The layers' policies as [`Policies`] reads them.
    pub fn policies(&self) -> Policies {
        let mut runs: Vec<(LayerPolicy, usize)> = Vec::new();
        for &policy in &self.layers {
            match runs.last_mut() {
                Some((last, count)) if *last == policy => *count += 1,
                _ => runs.push((policy, 1)),
            }
        }
        Policies(runs)
    }
}

/// For people: what differs from [`Layout::plain`] with the embedding in its file.
impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "micro-batch {}, recompute {}",
            self.micro_batch,
            self.policies()
        )?;
        write!(f, ", head {}", head_name(self.head))?;
        if self.stream {
            f.write_str(", weights streamed")?;
        }
        if self.state != StateOn::Device {
            write!(f, ", optimizer state on the {}", self.state.name())?;
        }
        if self.in_backward {
            f.write_str(", optimizer in backward")?;
        }
        Ok(())
    }
}

/// The flag's value.
pub fn head_name(head: HeadStorage) -> &'static str {
    match head {
        HeadStorage::Compute => "compute",
        HeadStorage::Int8 => "int8",
        HeadStorage::Nf4 => "nf4",
        HeadStorage::Stream => "stream",
    }
}

/// Policies of layers from the first to the last, in runs: `full:20,smart+offload:4,none:4`, or one for all: `smart`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policies(Vec<(LayerPolicy, usize)>);

impl Policies {
    /// One policy for each of `layers` layers.
    ///
    /// # Errors
    /// The numbers of layers do not add up.
    pub fn layers(&self, layers: usize) -> Result<Vec<LayerPolicy>> {
        // Without a number a policy is for all layers, or for those that the others leave.
        let given = self
            .0
            .iter()
            .fold(0usize, |sum, (_, count)| sum.saturating_add(*count));
        let open = self.0.iter().filter(|(_, count)| *count == 0).count();
        let fits = match open {
            0 => given == layers,
            1 => given < layers,
            _ => false,
        };
        if !fits {
            return Err(Error::Usage(format!(
                "--recompute: found {self} for a model of {layers} layers, expected numbers that add up to {layers}; one of the \
                 policies may go without a number: it takes the rest"
            )));
        }
        let runs = self.0.iter().map(|&(policy, count)| match count {
            0 => vec![policy; layers - given],
            count => vec![policy; count],
        });
        Ok(runs.flatten().collect())
    }
}

const NAMES: [(&str, Recompute); 3] = [
    ("none", Recompute::None),
    ("smart", Recompute::Smart),
    ("full", Recompute::Full),
];

impl FromStr for Policies {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |part: &str| {
            Error::Usage(format!(
                "--recompute: found {part}, expected auto, none, smart or full, or a list of them with numbers of layers such as full:20,none:8; \
                 each may have +offload behind it"
            ))
        };
        let run = |part: &str| {
            let (policy, count) = match part.split_once(':') {
                Some((policy, count)) => {
                    let count = count.parse().ok().filter(|&count: &usize| count > 0);
                    (policy, count.ok_or_else(|| wrong(part))?)
                }
                None => (part, 0),
            };
            let (name, offload) = match policy.strip_suffix("+offload") {
                Some(name) => (name, true),
                None => (policy, false),
            };
            let known = NAMES.iter().find(|(known, _)| *known == name);
            let &(_, recompute) = known.ok_or_else(|| wrong(part))?;
            Ok((LayerPolicy { recompute, offload }, count))
        };
        let runs: Result<Vec<_>> = text.split(',').map(|part| run(part.trim())).collect();
        Ok(Self(runs?))
    }
}

impl fmt::Display for Policies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let alone = self.0.len() == 1;
        for (i, (policy, count)) in self.0.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            let name = NAMES.iter().find(|(_, known)| *known == policy.recompute);
            let name = name.map_or("", |(name, _)| name);
            let offload = if policy.offload { "+offload" } else { "" };
            write!(f, "{comma}{name}{offload}")?;
            if *count > 0 && !alone {
                write!(f, ":{count}")?;
            }
        }
        Ok(())
    }
}

/// Bytes as people write them: `12GB` (10⁹), `12GiB` (2³⁰), `500MB`, or a plain number of bytes.
///
/// # Errors
/// It is none.
pub fn parse_bytes(flag: &str, text: &str) -> Result<u64> {
    let text = text.trim();
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" | "m" => 1e6,
        "gb" | "g" => 1e9,
        "kib" => 1024.0,
        "mib" => 1_048_576.0,
        "gib" => 1_073_741_824.0,
        _ => f64::NAN,
    };
    match number.parse::<f64>().map(|number| number * unit) {
        Ok(bytes) if (1.0..1e18).contains(&bytes) => Ok(bytes as u64),
        _ => Err(Error::Usage(format!(
            "{flag}: found {text}, expected an amount of memory such as 12GB or 500MB"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(text: &str, count: usize) -> Result<Vec<LayerPolicy>> {
        text.parse::<Policies>()?.layers(count)
    }

    #[test]
    fn policies_are_read_as_they_are_written() {
        for text in [
            "smart",
            "full:20,none:8",
            "smart+offload:3,full:1",
            "none+offload",
        ] {
            let policies: Policies = text.parse().unwrap();
            assert_eq!(policies.to_string(), text);
        }
        let mut plain = Layout::plain(1, 4);
        plain.layers = layers("full:1,smart+offload:2,none:1", 4).unwrap();
        assert_eq!(plain.policies().to_string(), "full:1,smart+offload:2,none:1");
        assert_eq!(
            plain.layers[1],
            LayerPolicy {
                recompute: Recompute::Smart,
                offload: true
            }
        );
        assert_eq!(
            layers("full:1,none", 4).unwrap(),
            layers("full:1,none:3", 4).unwrap()
        );
        for (text, count) in [
            ("full:1", 4),
            ("none:3,full:2", 4),
            ("none,full", 4),
            ("none:4,full", 4),
        ] {
            let message = layers(text, count).unwrap_err().to_string();
            assert!(message.contains("add up to 4"), "{message}");
        }
        for text in ["", "some", "full:x", "full:0", "smart+off"] {
            assert_eq!(text.parse::<Policies>().unwrap_err().exit_code(), 2, "{text}");
        }
    }

    #[test]
    fn bytes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("12GB", 12_000_000_000),
            ("12 GiB", 12 << 30),
            ("0.5gb", 500_000_000),
            ("300M", 300_000_000),
            ("1024", 1024),
        ] {
            assert_eq!(parse_bytes("--vram", text).unwrap(), bytes, "{text}");
        }
        for text in ["", "GB", "-1GB", "12 parsecs", "0", "1e30GB"] {
            assert_eq!(parse_bytes("--vram", text).unwrap_err().exit_code(), 2, "{text}");
        }
    }
}
