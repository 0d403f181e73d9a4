//! 4-bit weights: quantising and decoding to the bit, the order of the device and back, products in both directions.

use glmtune::ops::{self, Adapter, WeightRef};
use glmtune::quant::{Absmax, QuantTensor, QuantType};
use glmtune::tensor::{DType, Device, Tensor};

use crate::{TYPES, assert_matches, device, down, nan, random, twice, up, wide};

const KINDS: [(QuantType, bool); 5] = [
    (QuantType::Nf4, true),
    (QuantType::Nf4, false),
    (QuantType::Fp4, true),
    (QuantType::Fp4, false),
    INT4,
];

/// Whole numbers with a scale for each row.
const INT4: (QuantType, bool) = (QuantType::Int4, false);

/// Deviation of weights, about that of ChatGLM-6B's.
const WEIGHT: f32 = 0.03;

fn quantized(seed: u64, [n, k]: [usize; 2], (quant_type, double_quant): (QuantType, bool)) -> QuantTensor {
    QuantTensor::quantize(
        &random(DType::F32, [n, k], seed, WEIGHT),
        quant_type,
        double_quant,
    )
    .unwrap()
}

fn placed(weight: &QuantTensor, device: Device) -> QuantTensor {
    ops::place_quantized(weight.clone(), device).unwrap()
}

#[track_caller]
fn assert_equal(what: &str, got: &QuantTensor, want: &QuantTensor) {
    assert_eq!(
        (got.quant_type, got.shape),
        (want.quant_type, want.shape),
        "{what}"
    );
    assert_eq!(got.source_dtype, want.source_dtype, "{what}");
    assert!(got.codes.bytes() == want.codes.bytes(), "{what}: codes differ");
    match (&got.absmax, &want.absmax) {
        (Absmax::Flat(got), Absmax::Flat(want)) => assert_eq!(got.bytes(), want.bytes(), "{what}: absmax"),
        (
            Absmax::Nested {
                codes,
                nested_absmax,
                offset,
                code,
            },
            Absmax::Nested {
                codes: want_codes,
                nested_absmax: want_nested,
                offset: want_offset,
                code: want_code,
            },
        ) => {
            assert_eq!(offset.to_bits(), want_offset.to_bits(), "{what}: offset");
            assert_eq!(
                nested_absmax.bytes(),
                want_nested.bytes(),
                "{what}: nested absmax"
            );
            assert!(
                codes.bytes() == want_codes.bytes(),
                "{what}: codes of absmax differ"
            );
            assert_eq!(code.bytes(), want_code.bytes(), "{what}: map");
        }
        _ => panic!("{what}: one is flat, the other nested"),
    }
}

#[test]
fn the_order_of_the_device_is_undone_on_the_way_back() {
    let Some(device) = device() else { return };
    for (n, k) in [(1, 64), (16, 128), (31, 192), (33, 320), (130, 64), (96, 1088)] {
        for kind in KINDS {
            let weight = quantized(3, [n, k], kind);
            let there = placed(&weight, device);
            assert_eq!(there.codes.device(), device);
            let back = placed(&there, Device::Cpu);
            assert_equal(&format!("{kind:?} [{n}, {k}]"), &back, &weight);
        }
    }
}

#[test]
fn a_weight_is_decoded_to_the_bit() {
    let Some(device) = device() else { return };
    for (n, k) in [(1, 64), (33, 192), (40, 1088)] {
        for kind in KINDS {
            let weight = quantized(4, [n, k], kind);
            let there = placed(&weight, device);
            for dtype in TYPES {
                let got = twice("dequantize", || {
                    let mut out = up(device, &nan(dtype, [n, k]));
                    let rows = 0..there.shape.rows_and_columns().0;
                    ops::dequantize(WeightRef::Quant(&there), rows, &mut out).unwrap();
                    vec![out]
                });
                let want = weight.dequantize().to_dtype(dtype);
                assert!(
                    down(&got[0]).to_f64_vec() == want.to_f64_vec(),
                    "{kind:?} {dtype} [{n}, {k}]"
                );
            }
        }
    }
}

#[test]
fn quantising_gives_the_bits_of_the_cpu() {
    let Some(device) = device() else { return };
    // Sizes around the steps of the mean's cascade: fewer than 8 scales, 8 to 32, whole and broken stretches of 512 scales.
    for (n, k) in [
        (1, 64),
        (3, 128),
        (5, 64),
        (9, 128),
        (40, 64),
        (65, 512),
        (257, 256),
        (1100, 1024),
    ] {
        for dtype in TYPES {
            let mut source = random(dtype, [n, k], 5, WEIGHT);
            if n > 4 {
                // A block of zeros, and one of subnormals.
                let bytes = source.bytes_mut();
                bytes[..64 * dtype.size()].fill(0);
                let subnormal = [1, 0, 0, 0];
                for x in bytes[64 * dtype.size()..128 * dtype.size()].chunks_mut(dtype.size()) {
                    x.copy_from_slice(&subnormal[..dtype.size()]);
                }
            }
            for (quant_type, double_quant) in KINDS {
                let what = format!("{quant_type} {double_quant} {dtype} [{n}, {k}]");
                let want = QuantTensor::quantize(&source, quant_type, double_quant).unwrap();
                let there = ops::quantize("weight", &source, quant_type, double_quant, device).unwrap();
                assert_eq!(there.codes.device(), device, "{what}");
                assert_equal(&what, &placed(&there, Device::Cpu), &want);
            }
        }
    }
}

#[test]
fn equal_scales_and_a_weight_that_is_not_a_number_are_as_on_the_cpu() {
    let Some(device) = device() else { return };
    let ones = Tensor::from_slice(&[0.5f32; 64 * 300], [300, 64]);
    let there = ops::quantize("weight", &ones, QuantType::Nf4, true, device).unwrap();
    let want = QuantTensor::quantize(&ones, QuantType::Nf4, true).unwrap();
    assert_equal("equal scales", &placed(&there, Device::Cpu), &want);
    for (bad, double_quant) in [(f32::NAN, false), (f32::NEG_INFINITY, true), (3e38, true)] {
        let mut values = vec![1f32; 640];
        values[if bad < 1e38 { 200 } else { 100 }] = bad;
        if bad == 3e38 {
            values.fill(bad);
        }
        for dtype in TYPES {
            if bad == 3e38 && dtype == DType::F16 {
                continue;
            }
            let source = Tensor::from_slice(&values, [10, 64]).to_dtype(dtype);
            let theirs = QuantTensor::quantize_named("model: w", &source, QuantType::Nf4, double_quant);
            let ours = ops::quantize("model: w", &source, QuantType::Nf4, double_quant, device);
            assert_eq!(ours.unwrap_err().to_string(), theirs.unwrap_err().to_string());
        }
    }
}

#[test]
fn a_shape_that_no_kernel_takes_is_refused() {
    let Some(device) = device() else { return };
    let weight = quantized(6, [4, 96], (QuantType::Nf4, false));
    let error = ops::place_quantized(weight, device).unwrap_err().to_string();
    assert!(
        error.contains("[4, 96]") && error.contains("multiple of 64"),
        "{error}"
    );
}

/// `linear` and `linear_backward_input` of one shape and kind in one type against the CPU in f64.
fn check_products(device: Device, [m, n, k]: [usize; 3], kind: (QuantType, bool), dtype: DType, more: bool) {
    let what = format!("{kind:?} M {m} N {n} K {k}");
    let weight = quantized(7, [n, k], kind);
    let there = placed(&weight, device);
    // Rounding errors are relative to the terms of a sum; in f32 to the sums themselves, one after the other.
    let scale = f64::from(WEIGHT);
    let terms = |k: usize| if dtype == DType::F32 { k * k } else { k };
    let host = WeightRef::Quant(&weight);
    let there = WeightRef::Quant(&there);

    let x = random(dtype, [m, k], 8, 1.0);
    let bias = random(DType::F32, [n], 9, 0.05);
    let residual = random(dtype, [m, n], 10, 0.01);
    let got = twice(&what, || {
        let mut y = up(device, &nan(dtype, [m, n]));
        let (bias, residual) = (up(device, &bias), up(device, &residual));
        ops::linear(
            &up(device, &x),
            there,
            more.then_some(&bias),
            more.then_some((7.5, &residual)),
            &mut y,
        )
        .unwrap();
        vec![y]
    });
    let mut want = nan(DType::F64, [m, n]);
    let (bias, residual) = (wide(&bias), wide(&residual));
    let (bias, residual) = (more.then_some(&bias), more.then_some((7.5, &residual)));
    ops::linear(&wide(&x), host, bias, residual, &mut want).unwrap();
    assert_matches(&format!("linear {what}"), &got[0], &want, dtype, terms(k), scale);

    let dy = random(dtype, [m, n], 11, 1.0);
    let residual = random(dtype, [m, k], 12, 0.01);
    let got = twice(&what, || {
        let mut dx = up(device, &nan(dtype, [m, k]));
        let residual = up(device, &residual);
        let residual = more.then_some((7.5, &residual));
        ops::linear_backward_input(&up(device, &dy), there, residual, &mut dx).unwrap();
        vec![dx]
    });
    let mut want = nan(DType::F64, [m, k]);
    let residual = wide(&residual);
    let residual = more.then_some((7.5, &residual));
    ops::linear_backward_input(&wide(&dy), host, residual, &mut want).unwrap();
    assert_matches(
        &format!("backward {what}"),
        &got[0],
        &want,
        dtype,
        terms(n),
        scale,
    );

    if dtype != DType::F32 {
        let got = twice(&what, || {
            let mut y = up(device, &nan(DType::F32, [m, n]));
            ops::linear(&up(device, &x), there, None, None, &mut y).unwrap();
            vec![y]
        });
        let mut want = nan(DType::F64, [m, n]);
        ops::linear(&wide(&x), host, None, None, &mut want).unwrap();
        // Weights are rounded to `dtype`, sums are not.
        assert_matches(
            &format!("linear into f32 {what}"),
            &got[0],
            &want,
            dtype,
            k,
            scale,
        );
    }
}

#[test]
fn products_are_those_of_the_decoded_weight() {
    let Some(device) = device() else { return };
    let mut round = 0;
    for m in [1, 2, 8, 9, 16, 17, 32, 33, 63, 64, 65, 127, 128, 129] {
        for (n, k) in [(16, 64), (130, 128), (64, 192), (33, 320)] {
            round += 1;
            for dtype in TYPES {
                check_products(
                    device,
                    [m, n, k],
                    KINDS[round % KINDS.len()],
                    dtype,
                    round % 3 != 0,
                );
            }
        }
    }
}

#[test]
fn long_reductions_are_cut_into_parts() {
    let Some(device) = device() else { return };
    // Few columns, many reduced elements: in both directions sums go through the scratch memory.
    for (m, n, k) in [
        (1, 32, 4608),
        (12, 64, 4096),
        (20, 96, 4096),
        (40, 64, 4096),
        (70, 2048, 64),
    ] {
        for dtype in [DType::F16, DType::BF16] {
            for kind in [KINDS[m % 4], INT4] {
                check_products(device, [m, n, k], kind, dtype, true);
            }
        }
    }
}

#[test]
fn many_tiles_take_the_tall_kernel() {
    let Some(device) = device() else { return };
    for dtype in [DType::F16, DType::BF16] {
        check_products(device, [130, 6200, 64], KINDS[0], dtype, true);
        check_products(device, [130, 64, 6208], KINDS[1], dtype, true);
        check_products(device, [130, 6200, 64], INT4, dtype, true);
        check_products(device, [130, 64, 6208], INT4, dtype, true);
    }
}

#[test]
fn tiny_weights_keep_their_digits_in_f16() {
    let Some(device) = device() else { return };
    // Scales around 1e-6, subnormal in f16, beside some of ordinary size.
    let mut values = random(DType::F32, [64, 128], 13, 5e-7);
    for (i, x) in values.as_mut_slice::<f32>().iter_mut().enumerate() {
        if i % 1280 < 64 {
            *x *= 1e5;
        }
    }
    let weight = QuantTensor::quantize(&values, QuantType::Nf4, false).unwrap();
    let there = placed(&weight, device);
    for m in [3, 40] {
        let x = random(DType::F16, [m, 128], 14, 1.0);
        let mut y = up(device, &nan(DType::F32, [m, 64]));
        ops::linear(&up(device, &x), WeightRef::Quant(&there), None, None, &mut y).unwrap();
        let mut want = nan(DType::F64, [m, 64]);
        ops::linear(&wide(&x), WeightRef::Quant(&weight), None, None, &mut want).unwrap();
        let (got, want) = (down(&y).to_f64_vec(), want.to_f64_vec());
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let size: f64 = if (i % 64) * 128 % 1280 < 64 || (i % 64 * 128 + 64) % 1280 < 64 {
                0.05
            } else {
                5e-7
            };
            let tolerance = 2e-3 * size * 128f64.sqrt();
            assert!(
                (got - want).abs() <= tolerance,
                "row {} output {}: {got} for {want}",
                i / 64,
                i % 64
            );
        }
    }
}

#[test]
fn an_adapter_is_a_step_of_the_product() {
    let Some(device) = device() else { return };
    // In turn: few rows, short and tall tiles, parts; ranks within a step, of several, ragged, and beyond what is fused.
    let sizes = [
        [1, 40, 128],
        [14, 64, 4096],
        [30, 33, 64],
        [65, 130, 192],
        [70, 64, 1024],
        [129, 6200, 64],
    ];
    for (i, [m, n, k]) in sizes.into_iter().enumerate() {
        let weight = quantized(15, [n, k], KINDS[i % KINDS.len()]);
        let there = placed(&weight, device);
        let (host, there) = (WeightRef::Quant(&weight), WeightRef::Quant(&there));
        for (rank, dtype) in [1, 8, 16, 33, 64, 72]
            .into_iter()
            .flat_map(|rank| TYPES.map(|t| (rank, t)))
        {
            if n * k > 100_000 && rank != 16 {
                continue;
            }
            let what = format!("adapter M {m} N {n} K {k} rank {rank}");
            let scale = f64::from(WEIGHT);
            let terms = |k: usize| {
                if dtype == DType::F32 {
                    (k + rank).pow(2)
                } else {
                    k + rank
                }
            };
            let (x, dy) = (random(dtype, [m, k], 16, 1.0), random(dtype, [m, n], 17, 1.0));
            let u = random(dtype, [m, rank], 18, 1.0);
            let (b, a) = (
                random(DType::F32, [n, rank], 19, 0.06),
                random(DType::F32, [rank, k], 20, 0.06),
            );
            let residual = random(dtype, [m, n], 21, 0.01);
            let got = twice(&what, || {
                let (mut y, mut dx) = (up(device, &nan(dtype, [m, n])), up(device, &nan(dtype, [m, k])));
                let (u, residual) = (&up(device, &u), up(device, &residual));
                let adapter = Adapter {
                    scale: 0.5,
                    u,
                    matrix: &up(device, &b),
                };
                ops::linear_adapted(
                    &up(device, &x),
                    there,
                    None,
                    Some((2.0, &residual)),
                    adapter,
                    &mut y,
                )
                .unwrap();
                let adapter = Adapter {
                    scale: 0.5,
                    u,
                    matrix: &up(device, &a),
                };
                ops::linear_backward_input_adapted(&up(device, &dy), there, None, adapter, &mut dx).unwrap();
                vec![y, dx]
            });
            let (mut y, mut dx) = (nan(DType::F64, [m, n]), nan(DType::F64, [m, k]));
            let (u, residual) = (&wide(&u), wide(&residual));
            let adapter = Adapter {
                scale: 0.5,
                u,
                matrix: &wide(&b),
            };
            ops::linear_adapted(&wide(&x), host, None, Some((2.0, &residual)), adapter, &mut y).unwrap();
            let adapter = Adapter {
                scale: 0.5,
                u,
                matrix: &wide(&a),
            };
            ops::linear_backward_input_adapted(&wide(&dy), host, None, adapter, &mut dx).unwrap();
            assert_matches(&format!("forward {what}"), &got[0], &y, dtype, terms(k), scale);
            assert_matches(&format!("backward {what}"), &got[1], &dx, dtype, terms(n), scale);
        }
    }
}
