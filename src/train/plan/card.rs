//! What a card can do, as far as the cost model asks.

use crate::compute::Description;

/// Peak rates of a card.
#[derive(Debug, Clone, PartialEq)]
pub struct Card {
    /// The product's name.
    pub name: String,
    /// Dense products of 16-bit numbers with sums in f32, in 10¹² operations a second.
    pub tflops: f64,
    /// Of its memory, in 10⁹ bytes a second.
    pub bandwidth: f64,
    /// To and from page-locked host memory, each way, in 10⁹ bytes a second.
    pub bus: f64,
    /// Bytes of its memory.
    pub memory: u64,
}

/// Name, TFLOP/s, GB/s of memory, GB/s of the bus, GiB: NVIDIA's white papers and data sheets; the bus is PCIe 4 x16 (25 GB/s with
/// page-locked memory) but for the RTX 2080 Ti (PCIe 3), the RTX 4060 Ti (PCIe 4 x8), the RTX 5090 and the H100 (PCIe 5).
const CARDS: [(&str, f64, f64, f64, u64); 8] = [
    ("RTX 2080 Ti", 53.8, 616.0, 12.0, 11),
    ("RTX 3060", 25.5, 360.0, 25.0, 12),
    ("RTX 4060 Ti", 44.1, 288.0, 12.5, 16),
    ("RTX 3090", 71.0, 936.0, 25.0, 24),
    ("RTX 4090", 165.2, 1008.0, 25.0, 24),
    ("RTX 5090", 209.5, 1792.0, 50.0, 32),
    ("A100", 312.0, 1555.0, 25.0, 40),
    ("H100", 989.4, 3350.0, 50.0, 80),
];

impl Card {
    /// The names of the cards that are known.
    pub fn names() -> Vec<&'static str> {
        CARDS.iter().map(|card| card.0).collect()
    }

    /// The known card whose name `name` contains, whatever the case, spaces and dashes.
    pub fn named(name: &str) -> Option<Self> {
        let words = |text: &str| {
            let text = text.to_lowercase().replace(['-', '_'], " ");
            text.split_whitespace().map(str::to_string).collect::<Vec<_>>()
        };
        let asked = words(name);
        // Whole words: an RTX A1000 is no A100.
        let fits = |known: &[String]| {
            asked.windows(known.len()).any(|part| part == known) || asked.concat() == known.concat()
        };
        // The longest name that fits: a 4060 Ti is no 4060.
        let known = CARDS.iter().filter(|card| fits(&words(card.0)));
        let &(name, tflops, bandwidth, bus, gib) = known.max_by_key(|card| card.0.len())?;
        Some(Self {
            name: name.to_string(),
            tflops,
            bandwidth,
            bus,
            memory: gib << 30,
        })
    }

    /// An open device: a known card, or an estimate from its multiprocessors at 1.7 GHz, which serves to compare choices.
    pub fn of(device: &Description) -> Self {
        let memory = device.total_bytes;
        if let Some(known) = Self::named(&device.name) {
            let name = device.name.clone();
            return Self {
                name,
                memory,
                ..known
            };
        }
        // Operations of a multiprocessor in a clock.
        let per_clock = match device.capability {
            (8, 0) => 2048.0,
            (9, _) => 4096.0,
            _ => 512.0,
        };
        let multiprocessors = f64::from(device.multiprocessors);
        Self {
            name: device.name.clone(),
            tflops: multiprocessors * per_clock * 1.7e9 / 1e12,
            bandwidth: 10.0 * multiprocessors,
            bus: 12.0,
            memory,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_as_people_and_drivers_write_them() {
        let of = |name: &str| Card::named(name).map(|card| card.name);
        assert_eq!(of("rtx-4060-ti").as_deref(), Some("RTX 4060 Ti"));
        assert_eq!(of("NVIDIA GeForce RTX 3060").as_deref(), Some("RTX 3060"));
        assert_eq!(of("NVIDIA H100 80GB HBM3").as_deref(), Some("H100"));
        assert_eq!(of("NVIDIA A100-SXM4-40GB").as_deref(), Some("A100"));
        assert_eq!(of("rtx4090").as_deref(), Some("RTX 4090"));
        assert_eq!(of("NVIDIA GeForce RTX 4060"), None);
        assert_eq!(of("NVIDIA RTX A1000"), None);
    }
}
