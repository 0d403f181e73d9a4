//! Products of dense matrices.

use glmtune::ops::{self, WeightRef};
use glmtune::tensor::{DType, Device, Tensor};

use crate::{TYPES, assert_matches, device, nan, random, twice, up, wide};

/// Sums of products in f32 have the error of as many terms more: tensor cores cut where f32 rounds.
const CUT: usize = 64;

/// For an output of type `of`: what it is compared in, and over how many terms its error adds up.
fn rounding(of: DType, k: usize) -> (DType, usize) {
    (of, if of == DType::F32 { CUT * k } else { 1 })
}

/// Rows, outputs, inputs: the kernel for few rows and its edges, small tiles, K cut into parts, ragged sizes,
/// large tiles.
const LINEAR: [[usize; 3]; 12] = [
    [1, 7, 64],
    [3, 130, 72],
    [8, 33, 1032],
    [16, 65, 520],
    [1, 5, 63],
    [17, 64, 64],
    [17, 33, 1100],
    [63, 127, 65],
    [64, 128, 128],
    [65, 129, 7],
    [130, 66, 200],
    [65, 12_250, 24],
];

#[test]
fn linear_is_that_of_the_cpu() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        for (case, [m, n, k]) in LINEAR.into_iter().enumerate() {
            let x = random(dtype, [m, k], 1, 1.0);
            let w = random(dtype, [n, k], 2, 0.5);
            let bias = random(DType::F32, [n], 3, 2.0);
            let residual = random(dtype, [m, n], 4, 1.0);
            for (with_bias, with_residual, out) in [
                (false, false, dtype),
                (true, true, dtype),
                (case % 2 == 0, case % 2 == 1, dtype),
                (true, false, DType::F32),
            ] {
                let what = format!("linear {m}x{n}x{k} bias {with_bias} residual {with_residual} into {out}");
                let got = twice(&what, || {
                    let [x, w, bias, residual, mut y] =
                        [&x, &w, &bias, &residual, &nan(out, [m, n])].map(|t| up(device, t));
                    let bias = with_bias.then_some(&bias);
                    let residual = with_residual.then_some((1.5, &residual));
                    ops::linear(&x, WeightRef::Dense(&w), bias, residual, &mut y).unwrap();
                    vec![y]
                });
                let mut want = nan(DType::F64, [m, n]);
                let (bias, residual) = (wide(&bias), wide(&residual));
                let bias = with_bias.then_some(&bias);
                let residual = with_residual.then_some((1.5, &residual));
                ops::linear(&wide(&x), WeightRef::Dense(&wide(&w)), bias, residual, &mut want).unwrap();
                let (compared, terms) = rounding(out, k);
                assert_matches(&what, &got[0], &want, compared, terms, 1.0);
            }
        }
    }
}

#[test]
fn linear_backward_input_is_that_of_the_cpu() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        for [m, n, k] in LINEAR {
            // Outputs of the layer are summed over.
            let (n, k) = (k, n);
            let dy = random(dtype, [m, n], 1, 1.0);
            let w = random(dtype, [n, k], 2, 0.5);
            let residual = random(dtype, [m, k], 3, 1.0);
            for with_residual in [false, true] {
                let what = format!("linear_backward_input {m}x{n}x{k} residual {with_residual}");
                let got = twice(&what, || {
                    let [dy, w, residual, mut dx] =
                        [&dy, &w, &residual, &nan(dtype, [m, k])].map(|t| up(device, t));
                    let residual = with_residual.then_some((0.5, &residual));
                    ops::linear_backward_input(&dy, WeightRef::Dense(&w), residual, &mut dx).unwrap();
                    vec![dx]
                });
                let mut want = nan(DType::F64, [m, k]);
                let residual = wide(&residual);
                let residual = with_residual.then_some((0.5, &residual));
                ops::linear_backward_input(&wide(&dy), WeightRef::Dense(&wide(&w)), residual, &mut want)
                    .unwrap();
                let (compared, terms) = rounding(dtype, n);
                assert_matches(&what, &got[0], &want, compared, terms, 1.0);
            }
        }
    }
}

/// Which operand is transposed, and the types of a, b and c: `t` the compute type, `f` f32.
const PRODUCTS: [(bool, bool, &str); 9] = [
    (false, true, "ttt"),
    (false, true, "tft"),
    (false, true, "ttf"),
    (false, true, "tff"),
    (false, false, "ttt"),
    (false, false, "tft"),
    (false, false, "ftf"),
    (true, false, "ttf"),
    (true, false, "ftf"),
];

/// `alpha op(a) op(b) + beta c` against the CPU.
fn product(
    device: Device,
    dtype: DType,
    (ta, tb, types): (bool, bool, &str),
    [m, n, k]: [usize; 3],
    beta: f64,
) {
    let mut types = types.chars().map(|t| if t == 't' { dtype } else { DType::F32 });
    let [type_a, type_b, type_c] = std::array::from_fn(|_| types.next().unwrap());
    let a = random(type_a, if ta { [k, m] } else { [m, k] }, 1, 1.0);
    let b = random(type_b, if tb { [n, k] } else { [k, n] }, 2, 1.0);
    let c = if beta == 0.0 {
        nan(type_c, [m, n])
    } else {
        random(type_c, [m, n], 3, 1.0)
    };
    let what = format!("matmul {m}x{n}x{k} of {type_a} {ta} and {type_b} {tb} into {type_c}, beta {beta}");
    let got = twice(&what, || {
        let (a, b, mut c) = (up(device, &a), up(device, &b), up(device, &c));
        ops::matmul(-0.5, (&a, ta), (&b, tb), beta, &mut c).unwrap();
        vec![c]
    });
    // Factors of f32 are rounded to the compute type first.
    let rounded = |t: &Tensor| wide(&t.to_dtype(dtype));
    let mut want = if beta == 0.0 {
        nan(DType::F64, [m, n])
    } else {
        wide(&c)
    };
    ops::matmul(-0.5, (&rounded(&a), ta), (&rounded(&b), tb), beta, &mut want).unwrap();
    let (compared, terms) = rounding(type_c, k);
    assert_matches(&what, &got[0], &want, compared, terms, 1.0);
}

#[test]
fn products_of_every_kind_are_those_of_the_cpu() {
    let Some(device) = device() else { return };
    // An adapter's two products and their gradients among them, rank 8 and one that is no multiple of 8.
    let extents = [
        [1, 8, 256],
        [70, 8, 520],
        [8, 136, 640],
        [70, 5, 300],
        [6, 130, 300],
        [130, 136, 8],
        [65, 127, 5],
        [64, 64, 64],
        [1, 1, 1],
        [129, 65, 130],
        [16, 63, 1100],
    ];
    for dtype in [DType::F16, DType::BF16] {
        for kind in PRODUCTS {
            for (case, extents) in extents.into_iter().enumerate() {
                product(device, dtype, kind, extents, (case % 2) as f64);
            }
        }
    }
    for (ta, tb) in [(false, true), (false, false), (true, false)] {
        for (case, extents) in extents.into_iter().enumerate() {
            product(device, DType::F32, (ta, tb, "fff"), extents, (case % 2) as f64);
        }
    }
}

#[test]
fn products_by_large_tiles_are_those_of_the_cpu() {
    let Some(device) = device() else { return };
    for (case, kind) in PRODUCTS.into_iter().enumerate() {
        let dtype = [DType::F16, DType::BF16][case % 2];
        let extents = [[66, 12_250, 40], [12_250, 72, 33], [1_200, 1_240, 8]][case % 3];
        product(device, dtype, kind, extents, 1.0);
    }
}

#[test]
fn a_product_without_a_kernel_is_refused() {
    let Some(device) = device() else { return };
    let [half, other, single] =
        [DType::F16, DType::BF16, DType::F32].map(|t| up(device, &random(t, [8, 8], 1, 1.0)));
    let mut c = up(device, &nan(DType::F16, [8, 8]));
    for (a, b) in [
        ((&half, true), (&half, true)),
        ((&single, false), (&half, false)),
        ((&half, false), (&other, true)),
        ((&half, true), (&half, false)),
    ] {
        let error = ops::matmul(1.0, a, b, 0.0, &mut c).unwrap_err().to_string();
        assert!(error.contains("matmul"), "{error}");
    }
    // b of f32 would be one that trains: fine. A weight of the other half type is not.
    let error = ops::linear(&half, WeightRef::Dense(&other), None, None, &mut c)
        .unwrap_err()
        .to_string();
    assert!(error.contains("linear"), "{error}");
}
