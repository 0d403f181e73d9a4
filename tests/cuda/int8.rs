//! Weights in 8 bits with a scale for each row.

use glmtune::ops::{self, WeightRef};
use glmtune::quant::RowInt8;
use glmtune::tensor::{DType, Device, Tensor};

use crate::{TYPES, assert_matches, device, down, nan, random, twice, up, wide};

/// Rows, outputs, inputs: few rows and their edges, small tiles, K cut into parts, ragged sizes, large tiles.
const SIZES: [[usize; 3]; 11] = [
    [1, 7, 64],
    [3, 130, 80],
    [8, 33, 1040],
    [16, 65, 528],
    [2, 5, 63],
    [17, 64, 64],
    [17, 33, 1100],
    [63, 127, 65],
    [64, 128, 128],
    [65, 129, 7],
    [65, 12_250, 24],
];

fn weight(n: usize, k: usize) -> RowInt8 {
    let mut source = random(DType::F32, [n, k], 2, 0.5);
    // Scales that differ by far, and a row of zeros.
    for (row, values) in source.as_mut_slice::<f32>().chunks_mut(k).enumerate() {
        let factor = [1.0, 0.125, 3.0, 0.0][if row == 0 { 0 } else { row % 4 }];
        values.iter_mut().for_each(|x| *x *= factor);
    }
    RowInt8::quantize("w", &source).unwrap()
}

#[test]
fn rows_are_decoded_as_on_the_cpu() {
    let Some(device) = device() else { return };
    for [n, k] in [[1, 4], [7, 64], [33, 63], [40, 1100]] {
        let weight = weight(n, k);
        let there = ops::place_int8(weight.clone(), device).unwrap();
        for dtype in TYPES {
            let want = weight.dequantize().to_dtype(dtype);
            for rows in [0..n, n / 2..n, n / 3..n / 3 + 1] {
                let got = twice("dequantize", || {
                    let mut out = up(device, &nan(dtype, [rows.len(), k]));
                    ops::dequantize(WeightRef::Int8(&there), rows.clone(), &mut out).unwrap();
                    vec![out]
                });
                let row = k * dtype.size();
                let want = &want.bytes()[rows.start * row..rows.end * row];
                assert!(
                    down(&got[0]).bytes() == want,
                    "{dtype} rows {rows:?} of {n} x {k}"
                );
            }
        }
    }
}

/// A product with 8 bits against that with the dense matrix of the same numbers: the same bits but for the kernel of few rows,
/// which multiplies codes and then scales.
#[test]
fn products_are_those_of_the_decoded_matrix() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        for (case, [m, n, k]) in SIZES.into_iter().enumerate() {
            let weight = weight(n, k);
            let there = ops::place_int8(weight.clone(), device).unwrap();
            let decoded = weight.dequantize().to_dtype(dtype);
            let dense = up(device, &decoded);
            let few = dtype != DType::F32 && m <= 16 && k % 8 == 0;
            let x = random(dtype, [m, k], 1, 1.0);
            let bias = random(DType::F32, [n], 3, 2.0);
            let residual = random(dtype, [m, n], 4, 1.0);
            for (with_bias, with_residual, out) in [
                (false, false, dtype),
                (true, true, dtype),
                (case % 2 == 0, false, DType::F32),
            ] {
                let what = format!("linear {m}x{n}x{k} bias {with_bias} residual {with_residual} into {out}");
                let run = |w: WeightRef<'_>| {
                    let [x, bias, residual, mut y] =
                        [&x, &bias, &residual, &nan(out, [m, n])].map(|t| up(device, t));
                    let bias = with_bias.then_some(&bias);
                    let residual = with_residual.then_some((1.5, &residual));
                    ops::linear(&x, w, bias, residual, &mut y).unwrap();
                    vec![y]
                };
                let got = twice(&what, || run(WeightRef::Int8(&there)));
                if !few {
                    let want = run(WeightRef::Dense(&dense));
                    assert!(down(&got[0]).bytes() == down(&want[0]).bytes(), "{what} {dtype}");
                }
                let mut want = nan(DType::F64, [m, n]);
                let (bias, residual) = (wide(&bias), wide(&residual));
                let bias = with_bias.then_some(&bias);
                let residual = with_residual.then_some((1.5, &residual));
                // Few rows meet the weights as they are, others rounded to the compute type.
                let exact = few && k % 16 == 0;
                let w = wide(&if exact {
                    weight.dequantize()
                } else {
                    decoded.clone()
                });
                ops::linear(&wide(&x), WeightRef::Dense(&w), bias, residual, &mut want).unwrap();
                let terms = if out == DType::F32 { 64 * k } else { 1 };
                assert_matches(&what, &got[0], &want, out, terms, 3.0);
            }

            let dy = random(dtype, [m, n], 5, 1.0);
            let residual = random(dtype, [m, k], 6, 1.0);
            for with_residual in [false, true] {
                let what = format!("linear_backward_input {m}x{n}x{k} residual {with_residual}");
                let run = |w: WeightRef<'_>| {
                    let [dy, residual, mut dx] = [&dy, &residual, &nan(dtype, [m, k])].map(|t| up(device, t));
                    let residual = with_residual.then_some((0.5, &residual));
                    ops::linear_backward_input(&dy, w, residual, &mut dx).unwrap();
                    vec![dx]
                };
                let got = twice(&what, || run(WeightRef::Int8(&there)));
                let want = run(WeightRef::Dense(&dense));
                assert!(down(&got[0]).bytes() == down(&want[0]).bytes(), "{what} {dtype}");
            }
        }
    }
}

/// An adapter on 8 bits is a product of its own; DoRA's row norms are those of the decoded matrix.
#[test]
fn adapters_go_with_8_bits() {
    let Some(device) = device() else { return };
    let dtype = DType::F16;
    let (m, n, k, r) = (20, 40, 64, 4);
    let there = ops::place_int8(weight(n, k), device).unwrap();
    let dense = up(device, &weight(n, k).dequantize().to_dtype(dtype));
    let on = |t: Tensor| up(device, &t);
    let (x, u) = (
        on(random(dtype, [m, k], 1, 1.0)),
        on(random(dtype, [m, r], 2, 1.0)),
    );
    let b = on(random(DType::F32, [n, r], 3, 1.0));
    let run = |w: WeightRef<'_>| {
        let mut y = on(nan(dtype, [m, n]));
        let adapter = ops::Adapter {
            scale: 0.5,
            u: &u,
            matrix: &b,
        };
        ops::linear_adapted(&x, w, None, None, adapter, &mut y).unwrap();
        down(&y)
    };
    let (got, want) = (run(WeightRef::Int8(&there)), run(WeightRef::Dense(&dense)));
    assert_eq!(got.bytes(), want.bytes());
    let squares = |w: WeightRef<'_>, device: Device| {
        let mut squares = up(device, &nan(DType::F32, [n]));
        ops::row_squares(w, &mut squares).unwrap();
        squares
    };
    let want = wide(&squares(WeightRef::Int8(&weight(n, k)), Device::Cpu));
    let got = squares(WeightRef::Int8(&there), device);
    assert_matches("row_squares", &got, &want, DType::F32, k, 64.0);
}
