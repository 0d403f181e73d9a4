//! DoRA: row norms, factors on columns; noise and casts.

use glmtune::ops::{self, WeightRef};
use glmtune::quant::{QuantTensor, QuantType};
use glmtune::rng::Stream;
use glmtune::tensor::{DType, Tensor};

use crate::{TYPES, assert_matches, device, down, nan, random, twice, up, wide};

/// `[M, N]`: the least, widths that fit no vector, one short of a strip, a strip, one more, more rows than a part of a sum,
/// the model's own.
const SIZES: [(usize, usize); 8] = [
    (1, 1),
    (3, 7),
    (5, 1023),
    (2, 1024),
    (66, 1032),
    (300, 40),
    (2, 4100),
    (3, 16384),
];

#[test]
fn row_squares() {
    let Some(device) = device() else { return };
    for (n, k) in SIZES {
        for dtype in TYPES {
            let w = random(dtype, [n, k], 1, 1.0);
            let mut want = Tensor::zeros(DType::F64, [n]);
            ops::row_squares(WeightRef::Dense(&wide(&w)), &mut want).unwrap();
            let got = twice("row_squares", || {
                let mut squares = up(device, &nan(DType::F32, [n]));
                ops::row_squares(WeightRef::Dense(&up(device, &w)), &mut squares).unwrap();
                vec![squares]
            });
            assert_matches(
                &format!("row_squares {n} {k}"),
                &got[0],
                &want,
                DType::F32,
                k,
                1.0,
            );
        }
    }
    // In 4 bits, by way of the decoded weight.
    let (n, k) = (64, 128);
    let w = QuantTensor::quantize(&random(DType::F32, [n, k], 1, 1.0), QuantType::Nf4, true).unwrap();
    let mut want = Tensor::zeros(DType::F64, [n]);
    ops::row_squares(WeightRef::Quant(&w), &mut want).unwrap();
    let there = ops::place_quantized(w, device).unwrap();
    let mut squares = up(device, &nan(DType::F32, [n]));
    ops::row_squares(WeightRef::Quant(&there), &mut squares).unwrap();
    assert_matches("row_squares 4-bit", &squares, &want, DType::F32, k, 1.0);
}

#[test]
fn gains() {
    let Some(device) = device() else { return };
    for (n, r) in [(1, 1), (255, 3), (256, 8), (257, 16), (4100, 64)] {
        let all = [
            random(DType::F32, [n], 1, 1.0),
            // Far from 0, as squares of norms are.
            Tensor::from_slice(&vec![1e3f32; n], [n]),
            random(DType::F32, [n, r], 2, 0.5),
            random(DType::F32, [r, n], 3, 0.5),
            random(DType::F32, [n, r], 4, 0.5),
        ];
        let run = |all: &[Tensor], mut gain: Tensor, mut inverse: Tensor| {
            let [m, squares, b, p, q] = all else {
                unreachable!()
            };
            ops::dora_gain(m, squares, b, (p, q), 1.5, (&mut gain, &mut inverse)).unwrap();
            vec![gain, inverse]
        };
        let zeros = || Tensor::zeros(DType::F64, [n]);
        let want = run(&all.each_ref().map(wide), zeros(), zeros());
        let got = twice("dora_gain", || {
            let empty = || up(device, &nan(DType::F32, [n]));
            run(&all.each_ref().map(|x| up(device, x)), empty(), empty())
        });
        for (got, want) in got.iter().zip(&want) {
            assert_matches(&format!("dora_gain {n} {r}"), got, want, DType::F32, r, 0.03);
        }
    }
}

#[test]
fn a_norm_of_zero_shows() {
    let Some(device) = device() else { return };
    let zeros = |shape: &[usize]| up(device, &Tensor::zeros(DType::F32, shape));
    let (mut gain, mut inverse) = (zeros(&[3]), zeros(&[3]));
    let (m, squares, b) = (zeros(&[3]), zeros(&[3]), zeros(&[3, 2]));
    let (p, q) = (zeros(&[2, 3]), zeros(&[3, 2]));
    ops::dora_gain(&m, &squares, &b, (&p, &q), 1.0, (&mut gain, &mut inverse)).unwrap();
    assert!(down(&gain).to_f64_vec().iter().all(|g| g.is_nan()));
}

#[test]
fn scaled_columns_and_their_gradient() {
    let Some(device) = device() else { return };
    for (m, n) in SIZES {
        for dtype in TYPES {
            let (x, r) = (random(dtype, [m, n], 1, 1.0), random(dtype, [m, n], 2, 1.0));
            let (g, b) = (random(DType::F32, [n], 3, 1.0), random(DType::F32, [n], 4, 1.0));
            let what = format!("scale_columns {m} {n}");
            for (bias, residual) in [(true, true), (false, true), (true, false)] {
                let run = |x: &Tensor, g: &Tensor, b: &Tensor, r: &Tensor, mut y: Tensor| {
                    let (b, r) = (bias.then_some(b), residual.then_some((1.5, r)));
                    ops::scale_columns(x, g, -1.0, b, r, &mut y).unwrap();
                    vec![y]
                };
                let want = run(
                    &wide(&x),
                    &wide(&g),
                    &wide(&b),
                    &wide(&r),
                    Tensor::zeros(DType::F64, [m, n]),
                );
                let got = twice(&what, || {
                    let there = [&x, &g, &b, &r].map(|t| up(device, t));
                    run(
                        &there[0],
                        &there[1],
                        &there[2],
                        &there[3],
                        up(device, &nan(dtype, [m, n])),
                    )
                });
                assert_matches(&what, &got[0], &want[0], dtype, 1, 4.0);
            }
            let mut want = wide(&r);
            ops::accumulate_scaled_columns(&wide(&x), &wide(&g), &mut want).unwrap();
            let got = twice("accumulate_scaled_columns", || {
                let mut y = up(device, &r);
                ops::accumulate_scaled_columns(&up(device, &x), &up(device, &g), &mut y).unwrap();
                vec![y]
            });
            assert_matches(&what, &got[0], &want, dtype, 1, 4.0);

            let mut want = wide(&b);
            ops::accumulate_column_products(&wide(&x), &wide(&r), &wide(&g), &mut want).unwrap();
            let got = twice("accumulate_column_products", || {
                let mut sums = up(device, &b);
                let (x, r, g) = (up(device, &x), up(device, &r), up(device, &g));
                ops::accumulate_column_products(&x, &r, &g, &mut sums).unwrap();
                vec![sums]
            });
            assert_matches(
                &format!("column_products {m} {n}"),
                &got[0],
                &want,
                DType::F32,
                m,
                4.0,
            );
        }
    }
}

#[test]
fn noise_is_that_of_the_cpu() {
    let Some(device) = device() else { return };
    for n in [1, 7, 1023, 4097] {
        for dtype in TYPES {
            let y = random(dtype, [n], 1, 1.0);
            let stream = Stream::new(7 << 33, u64::MAX - 5);
            let mut want = wide(&y);
            ops::accumulate_noise(0.25, stream, &mut want).unwrap();
            let got = twice("accumulate_noise", || {
                let mut y = up(device, &y);
                ops::accumulate_noise(0.25, stream, &mut y).unwrap();
                vec![y]
            });
            assert_matches(&format!("noise {n}"), &got[0], &want, dtype, 1, 1.0);
        }
    }
}

#[test]
fn what_dropout_took() {
    let Some(device) = device() else { return };
    for n in [1, 7, 1023, 4097] {
        for dtype in TYPES {
            let x = random(dtype, [n], 1, 1.0);
            let stream = Stream::new(3, 4);
            let mut want = Tensor::zeros(DType::F64, [n]);
            ops::dropout_rest(&wide(&x), 0.3, stream, &mut want).unwrap();
            let got = twice("dropout_rest", || {
                let mut y = up(device, &nan(dtype, [n]));
                ops::dropout_rest(&up(device, &x), 0.3, stream, &mut y).unwrap();
                vec![y]
            });
            assert_matches(&format!("dropout_rest {n}"), &got[0], &want, dtype, 1, 2.0);
        }
    }
}

#[test]
fn casts_round_as_the_cpu_does() {
    let Some(device) = device() else { return };
    for n in [1, 7, 2048, 4099] {
        for from in TYPES {
            for to in TYPES {
                let x = random(from, [n], 1, 3.0);
                let got = twice("cast", || {
                    let mut y = up(device, &nan(to, [n]));
                    ops::cast(&up(device, &x), &mut y).unwrap();
                    vec![y]
                });
                assert_eq!(
                    down(&got[0]).bytes(),
                    x.to_dtype(to).bytes(),
                    "{from} to {to}, {n}"
                );
            }
        }
    }
}
