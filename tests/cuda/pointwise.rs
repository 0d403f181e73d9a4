//! Elementwise functions and rotary positions.

use glmtune::model::glm::rope_tables;
use glmtune::ops;
use glmtune::rng::Stream;
use glmtune::tensor::{Compute, DType, Tensor};

use super::{TYPES, assert_matches, device, down, nan, random, twice, up, wide};

/// Around one thread's 16 bytes and one block's 4096; a slice of a real shape; what is no multiple of anything.
const SIZES: [usize; 12] = [1, 3, 4, 7, 8, 9, 1023, 1024, 2047, 2049, 3 * 4096, 3 * 16384 + 5];

/// Roundings to F32 on the way to an element; in the 16-bit types only the last rounding counts.
fn roundings(dtype: DType, in_f32: usize) -> usize {
    if dtype == DType::F32 { in_f32 } else { 1 }
}

#[test]
fn gelu() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        for n in SIZES {
            let mut x = random(dtype, [n], 1, 3.0);
            if n > 4096 {
                // Far out on both sides, where a careless formula overflows.
                let mut values = x.to_f64_vec();
                values[..6].copy_from_slice(&[40.0, -40.0, 0.0, -1e3, 1e3, -12.0]);
                x = Tensor::from_slice(&values, [n]).to_dtype(dtype);
            }
            let mut want = Tensor::zeros(DType::F64, [n]);
            ops::gelu(&wide(&x), &mut want).unwrap();
            let got = twice("gelu", || {
                let mut y = up(device, &nan(dtype, [n]));
                ops::gelu(&up(device, &x), &mut y).unwrap();
                vec![y]
            });
            assert_matches(
                &format!("gelu {n}"),
                &got[0],
                &want,
                dtype,
                roundings(dtype, 16),
                3.0,
            );

            let dy = random(dtype, [n], 2, 1.0);
            let mut want = wide(&dy);
            ops::gelu_backward(&wide(&x), &mut want).unwrap();
            let got = twice("gelu_backward", || {
                let mut d = up(device, &dy);
                ops::gelu_backward(&up(device, &x), &mut d).unwrap();
                vec![d]
            });
            let k = roundings(dtype, 64);
            assert_matches(&format!("gelu_backward {n}"), &got[0], &want, dtype, k, 3.0);
        }
    }
}

#[test]
fn what_is_not_a_number_stays_so() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        let x = nan(dtype, [19]);
        let mut y = up(device, &Tensor::zeros(dtype, [19]));
        ops::gelu(&up(device, &x), &mut y).unwrap();
        assert!(down(&y).to_f64_vec().iter().all(|y| y.is_nan()), "gelu {dtype}");
        let mut y = up(device, &Tensor::zeros(dtype, [19]));
        ops::dropout(&up(device, &x), 0.0, Stream::new(1, 2), &mut y).unwrap();
        assert!(
            down(&y).to_f64_vec().iter().all(|y| y.is_nan()),
            "dropout {dtype}"
        );
    }
}

#[test]
fn dropout() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        for n in SIZES {
            for (p, stream) in [
                (0.0, Stream::new(1, 2)),
                (0.1, Stream::new(u64::MAX - 3, 1 << 40)),
                (0.5, Stream::new(7 << 33, u64::MAX)),
            ] {
                let x = random(dtype, [n], 1, 1.0);
                let mut want = Tensor::zeros(DType::F64, [n]);
                ops::dropout(&wide(&x), p, stream, &mut want).unwrap();
                let got = twice("dropout", || {
                    let mut y = up(device, &nan(dtype, [n]));
                    ops::dropout(&up(device, &x), p, stream, &mut y).unwrap();
                    vec![y]
                });
                assert_matches(&format!("dropout {n} {p}"), &got[0], &want, dtype, 1, 1.0);
                let mask = |y: &Tensor| y.to_f64_vec().iter().map(|&y| y == 0.0).collect::<Vec<_>>();
                assert_eq!(
                    mask(&down(&got[0])),
                    mask(&want),
                    "dropout {n} {p} {dtype}: another mask"
                );

                let y = random(dtype, [n], 3, 1.0);
                let mut want = wide(&y);
                ops::accumulate_dropout(&wide(&x), p, stream, &mut want).unwrap();
                let got = twice("accumulate_dropout", || {
                    let mut y = up(device, &y);
                    ops::accumulate_dropout(&up(device, &x), p, stream, &mut y).unwrap();
                    vec![y]
                });
                assert_matches(
                    &format!("accumulate_dropout {n} {p}"),
                    &got[0],
                    &want,
                    dtype,
                    1,
                    3.0,
                );
            }
        }
    }
}

/// `[M, heads, head_dim]`: the least, widths that fit no vector, the models' own, more pairs than threads.
const HEADS: [(usize, usize, usize); 7] = [
    (1, 1, 4),
    (3, 2, 8),
    (5, 3, 20),
    (2, 4, 64),
    (3, 32, 128),
    (2, 1, 2048),
    (2, 3, 3000),
];

#[test]
fn rope() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        for (m, heads, head_dim) in HEADS {
            let shape = [m, heads * 3 * head_dim];
            let tables = rope_tables(Compute::cpu(DType::F32), head_dim, 17).unwrap();
            let positions: Vec<i32> = (0..2 * m as i32).map(|i| i * 5 % 17).collect();
            let positions = Tensor::from_slice(&positions, [m, 2]);
            let qkv = random(dtype, shape, 1, 1.0);
            for inverse in [false, true] {
                let mut want = wide(&qkv);
                ops::rope(&mut want, &positions, &wide(&tables), heads, inverse).unwrap();
                let got = twice("rope", || {
                    let mut qkv = up(device, &qkv);
                    let (positions, tables) = (up(device, &positions), up(device, &tables));
                    ops::rope(&mut qkv, &positions, &tables, heads, inverse).unwrap();
                    vec![qkv]
                });
                let what = format!("rope {m} {heads} {head_dim} {inverse}");
                assert_matches(&what, &got[0], &want, dtype, 2, 2.0);
            }
        }
    }
}

#[test]
fn a_position_outside_the_tables_makes_its_half_nan() {
    let Some(device) = device() else { return };
    let (heads, head_dim) = (2, 32);
    let tables = rope_tables(Compute::cpu(DType::F32), head_dim, 5).unwrap();
    let tables = up(device, &tables);
    for dtype in TYPES {
        let qkv = random(dtype, [2, heads * 3 * head_dim], 1, 1.0);
        let mut turned = up(device, &qkv);
        let positions = up(device, &Tensor::from_slice(&[1i32, 5, -1, 2], [2, 2]));
        ops::rope(&mut turned, &positions, &tables, heads, false).unwrap();
        for (i, y) in down(&turned).to_f64_vec().into_iter().enumerate() {
            let (row, part, second) = (
                i / (heads * 3 * head_dim),
                i / head_dim % 3,
                i % head_dim >= head_dim / 2,
            );
            let outside = part < 2 && second == (row == 0);
            assert_eq!(y.is_nan(), outside, "{dtype} element {i}");
        }
    }
}
