//! Does a card's `mma` and `ldmatrix` hand the lanes what the emulator's do? `lane_maps.txt` is the emulator's answer.
//!
//! `GLMTUNE_LANE_MAPS=FILE` writes what the device of this program answers; with feature `emu` that is how the file is made.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::device;
use glmtune::cuda::{LaneMap, lane_maps};

/// A line for each lane: kernel, block, lane, its registers.
fn lines(maps: &[LaneMap]) -> String {
    let mut text = String::new();
    for map in maps {
        for (i, registers) in map.words.chunks_exact(map.registers).enumerate() {
            write!(text, "{} {} {}:", map.kernel, i / 32, i % 32).unwrap();
            for register in registers {
                write!(text, " {register:08x}").unwrap();
            }
            text.push('\n');
        }
    }
    text
}

#[test]
fn lanes_hold_what_the_emulator_says() {
    if device().is_none() {
        return;
    }
    let got = lines(&lane_maps(0).unwrap());
    if let Some(file) = std::env::var_os("GLMTUNE_LANE_MAPS") {
        std::fs::write(file, &got).unwrap();
    }
    let want: BTreeMap<&str, &str> = include_str!("lane_maps.txt")
        .lines()
        .filter_map(|line| line.split_once(": "))
        .collect();
    let mut differ = Vec::new();
    for line in got.lines() {
        let (lane, registers) = line.split_once(": ").unwrap();
        let expected = want.get(lane).copied().unwrap_or_default();
        let mut pairs = expected.split(' ').zip(registers.split(' ')).enumerate();
        // Turing has no bf16: what it cannot answer is 0.
        let unanswered = |i: usize| lane.starts_with("lane_map_bits") && i > 18;
        if !pairs.all(|(i, (want, got))| want == got || unanswered(i) && got == "00000000") {
            differ.push(format!("{line}\n    expected {expected}"));
        }
    }
    assert!(
        differ.is_empty(),
        "{} lanes differ, the first:\n{}",
        differ.len(),
        differ[0]
    );
    assert!(got.lines().count() >= 6 * 4 * 32);
}
