//! Single instructions on given registers (`cuda/lane_maps.cu`): what a card answers, to hold the emulator against.

use std::ffi::c_void;

use super::sys::{LaneMapBits, LaneMapLdmatrix, LaneMapMma};
use super::{Grid, Memory, describe, launch_named};
use crate::error::Result;
use crate::rng::Stream;

/// Fragments of each kind.
const BLOCKS: usize = 4;
const LANES: usize = 32;

/// What the lanes of one kernel hold afterwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneMap {
    /// The kernel.
    pub kernel: &'static str,
    /// How many registers of each lane.
    pub registers: usize,
    /// `[blocks, 32 lanes, registers]`.
    pub words: Vec<u32>,
}

/// Runs every kernel of lane maps on device `ordinal`, with inputs whose results are exact: equal on every device.
///
/// # Errors
/// There is no such device, or it fails.
pub fn lane_maps(ordinal: u8) -> Result<Vec<LaneMap>> {
    let bf16 = describe(ordinal)?.capability.0 >= 8;
    let mut maps = vec![mma(ordinal, "lane_map_mma_f16", 10)?];
    if bf16 {
        maps.push(mma(ordinal, "lane_map_mma_bf16", 7)?);
    }
    for (kernel, registers) in [
        ("lane_map_ldmatrix_x4", 4),
        ("lane_map_ldmatrix_x4_trans", 4),
        ("lane_map_ldmatrix_x2", 2),
        ("lane_map_ldmatrix_x2_trans", 2),
    ] {
        maps.push(ldmatrix(ordinal, kernel, registers)?);
    }
    maps.push(bits(ordinal, bf16)?);
    Ok(maps)
}

fn upload(ordinal: u8, words: &[u32]) -> Result<Memory> {
    let bytes = bytemuck::cast_slice(words);
    let mut memory = Memory::new(ordinal, bytes.len())?;
    memory.upload(0, bytes)?;
    Ok(memory)
}

fn run<P: Copy>(
    ordinal: u8,
    kernel: &'static str,
    registers: usize,
    shared_bytes: u32,
    params: impl FnOnce(*mut c_void) -> P,
) -> Result<LaneMap> {
    let mut words = vec![u32::MAX; BLOCKS * LANES * registers];
    let output = upload(ordinal, &words)?;
    let grid = Grid {
        blocks: [BLOCKS as u32, 1, 1],
        threads: LANES as u32,
        shared_bytes,
    };
    let params = params(output.address() as *mut c_void);
    // SAFETY: the callers upload what the kernel reads of so many blocks, and the output has its size.
    unsafe { launch_named(ordinal, "lane_maps", kernel, grid, &params)? };
    output.download(0, bytemuck::cast_slice_mut(&mut words))?;
    Ok(LaneMap {
        kernel,
        registers,
        words,
    })
}

/// Small whole numbers, whose products and sums no order of additions rounds; in every fourth fragment `a` is subnormal.
fn mma(ordinal: u8, kernel: &'static str, mantissa: u32) -> Result<LaneMap> {
    let stream = Stream::new(1, u64::from(mantissa));
    let whole = |i: u64| stream.below(i, 33) as i32 - 16;
    // The two formats differ in where the exponent begins.
    let float = |n: i32| {
        let bits = match mantissa {
            10 => half::f16::from_f32(n as f32).to_bits(),
            _ => half::bf16::from_f32(n as f32).to_bits(),
        };
        u32::from(bits)
    };
    let pairs = |first: u64, count: usize| -> Vec<u32> {
        let words = (0..count as u64).map(|i| {
            let at = first + 2 * i;
            float(whole(at)) | float(whole(at + 1)) << 16
        });
        words.collect()
    };
    let mut a = pairs(0, BLOCKS * LANES * 4);
    for (i, word) in a[3 * LANES * 4..].iter_mut().enumerate() {
        *word = stream.bits(20_000 + i as u64) & 0x800f_800f;
    }
    let b = pairs(40_000, BLOCKS * LANES * 2);
    let c: Vec<u32> = (0..BLOCKS * LANES * 4)
        .map(|i| {
            if i < 3 * LANES * 4 {
                whole(60_000 + i as u64) as f32
            } else {
                0.0
            }
        })
        .map(f32::to_bits)
        .collect();
    let (a, b, c) = (upload(ordinal, &a)?, upload(ordinal, &b)?, upload(ordinal, &c)?);
    run(ordinal, kernel, 4, 0, |d| LaneMapMma {
        d: d.cast(),
        a: a.address() as *const u32,
        b: b.address() as *const u32,
        c: c.address() as *const f32,
    })
}

fn random(stream: Stream, words: usize) -> Vec<u32> {
    (0..words as u64).map(|i| stream.bits(i)).collect()
}

fn ldmatrix(ordinal: u8, kernel: &'static str, registers: usize) -> Result<LaneMap> {
    // Four tiles of 8 x 8 halves.
    let tiles = upload(ordinal, &random(Stream::new(2, 0), BLOCKS * 128))?;
    run(ordinal, kernel, registers, 512, |r| LaneMapLdmatrix {
        r: r.cast(),
        tiles: tiles.address() as *const u16,
    })
}

/// The register of `lane_map_bits` that holds an approximation.
const APPROXIMATE: usize = 18;

fn bits(ordinal: u8, bf16: bool) -> Result<LaneMap> {
    let stream = Stream::new(3, 0);
    let mut words = random(stream, BLOCKS * LANES * 3);
    // In half of the blocks pairs of moderate halves: of random ones most sums are one of their terms.
    for word in &mut words[..BLOCKS / 2 * LANES * 3] {
        *word = (*word & 0x83ff_83ff) | 0x3c00_3c00;
    }
    let x = upload(ordinal, &words)?;
    let mut map = run(ordinal, "lane_map_bits", 24, 0, |r| LaneMapBits {
        r: r.cast(),
        x: x.address() as *const u32,
    })?;
    for lane in map.words.chunks_exact_mut(24) {
        lane[APPROXIMATE] = 0;
        if !bf16 {
            lane[APPROXIMATE + 1..].fill(0);
        }
    }
    Ok(map)
}
