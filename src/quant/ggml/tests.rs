//! Each type against an independent computation in f64, and against bytes that `convert.py` wrote.

use super::*;
use crate::rng::Stream;

const QUANTIZED: [GgmlType; 5] = [
    GgmlType::Q4_0,
    GgmlType::Q4_1,
    GgmlType::Q5_0,
    GgmlType::Q5_1,
    GgmlType::Q8_0,
];

fn encoded(kind: GgmlType, tensor: &Tensor) -> Vec<u8> {
    let mut out = Vec::new();
    kind.encode("w", tensor, 0, &mut out).unwrap();
    out
}

fn decoded(kind: GgmlType, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![f32::NAN; bytes.len() / kind.block_bytes() * kind.block()];
    kind.decode(bytes, &mut out);
    out
}

/// Rows whose blocks are normal numbers of magnitudes from 1e-9 (below what float16 holds) to 100.
fn random(rows: usize, columns: usize) -> Tensor {
    let stream = Stream::new(11, 0);
    let values: Vec<f32> = (0..rows * columns)
        .map(|i| stream.normal(i as u64) * 10f32.powi((i / BLOCK % 12) as i32 - 9))
        .collect();
    Tensor::from_slice(&values, [rows, columns])
}

/// `x` rounded as an operation in this type rounds it.
fn rounded(x: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F16 => f16::from_f64(x).to_f64(),
        _ => f64::from(x as f32),
    }
}

/// What a block says when it is read bit by bit: d, m and the 32 codes.
fn fields(kind: GgmlType, block: &[u8]) -> (f64, f64, Vec<i64>) {
    let half = |i: usize| f64::from(half_at(block, i));
    let nibble = |from: usize, i: usize| i64::from(block[from + i % 16] >> (4 * (i / 16)) & 15);
    let fifth = |from: usize, i: usize| i64::from(block[from + i / 8] >> (i % 8) & 1) << 4;
    let codes = |f: &dyn Fn(usize) -> i64| (0..32).map(f).collect();
    match kind {
        GgmlType::Q4_0 => (half(0), 0.0, codes(&|i| nibble(2, i))),
        GgmlType::Q4_1 => (half(0), half(2), codes(&|i| nibble(4, i))),
        GgmlType::Q5_0 => (half(0), 0.0, codes(&|i| nibble(6, i) | fifth(2, i))),
        GgmlType::Q5_1 => (half(0), half(2), codes(&|i| nibble(8, i) | fifth(4, i))),
        _ => (half(0), 0.0, codes(&|i| i64::from(block[2 + i] as i8))),
    }
}

/// d, m and codes by the formulas, every operation exact in f64 and then rounded to the type of the weight.
fn formula(kind: GgmlType, x: &[f64], dtype: DType) -> (f64, f64, Vec<i64>) {
    let r = |v: f64| rounded(v, dtype);
    let code = |v: f64, low: f64, high: f64| {
        if v.is_nan() {
            0
        } else {
            v.round_ties_even().clamp(low, high) as i64
        }
    };
    let half = |v: f64| f16::from_f32(v as f32).to_f64();
    let mut largest = 0f64;
    for &v in x {
        if v.abs() > largest.abs() {
            largest = v;
        }
    }
    let smallest = x.iter().copied().fold(f64::INFINITY, f64::min);
    let highest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let signed = |n: f64| {
        let d = r(largest / -n);
        (
            half(d),
            0.0,
            x.iter()
                .map(|v| code(r(r(v / d) + n), 0.0, 2.0 * n - 1.0))
                .collect(),
        )
    };
    let affine = |n: f64| {
        let d = r(r(highest - smallest) / n);
        (
            half(d),
            half(smallest),
            x.iter().map(|v| code(r(r(v - smallest) / d), 0.0, n)).collect(),
        )
    };
    match kind {
        GgmlType::Q4_0 => signed(8.0),
        GgmlType::Q5_0 => signed(16.0),
        GgmlType::Q4_1 => affine(15.0),
        GgmlType::Q5_1 => affine(31.0),
        _ => {
            let d = r(largest.abs() / 127.0);
            (
                half(d),
                0.0,
                x.iter().map(|v| code(r(v / d), -128.0, 127.0)).collect(),
            )
        }
    }
}

#[test]
fn every_bit_is_the_formula() {
    let source = random(24, 96);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let stored = source.to_dtype(dtype);
        let values = stored.to_f64_vec();
        for kind in QUANTIZED {
            let bytes = encoded(kind, &stored);
            let numbers = decoded(kind, &bytes);
            for (i, block) in bytes.chunks(kind.block_bytes()).enumerate() {
                let x = &values[i * 32..][..32];
                let (d, m, codes) = fields(kind, block);
                assert_eq!(
                    (d, m, codes.clone()),
                    formula(kind, x, dtype),
                    "{kind} {dtype} block {i}"
                );
                let zero = match kind {
                    GgmlType::Q4_0 => 8,
                    GgmlType::Q5_0 => 16,
                    _ => 0,
                };
                for (j, code) in codes.iter().enumerate() {
                    let product = ((code - zero) as f64 * d) as f32;
                    assert_eq!(
                        numbers[i * 32 + j],
                        product + m as f32,
                        "{kind} {dtype} block {i}[{j}]"
                    );
                }
            }
        }
    }
}

/// The documented tolerance, on blocks whose scale float16 holds with all its digits.
#[test]
fn the_error_is_what_the_table_says() {
    let stream = Stream::new(12, 0);
    let values: Vec<f32> = (0..64 * 64).map(|i| 0.02 * stream.normal(i)).collect();
    let source = Tensor::from_slice(&values, [64, 64]);
    for kind in QUANTIZED {
        let bytes = encoded(kind, &source);
        let numbers = decoded(kind, &bytes);
        for (i, block) in bytes.chunks(kind.block_bytes()).enumerate() {
            let (d, _, _) = fields(kind, block);
            let x = &values[i * 32..][..32];
            let largest = x.iter().fold(0f32, |a, x| a.max(x.abs()));
            for (x, y) in x.iter().zip(&numbers[i * 32..]) {
                // The code 16 that would stand for the other end does not exist in q4_0 and q5_0.
                let one_sided = matches!(kind, GgmlType::Q4_0 | GgmlType::Q5_0) && x * d as f32 > 0.0;
                let steps = if one_sided { 1.0 } else { 0.5 };
                let most = steps * d.abs() as f32 + largest * 1.001 / 1024.0;
                assert!((x - y).abs() <= most, "{kind}: {x} became {y}, d {d}");
            }
        }
    }
}

/// Bytes written by chatglm_cpp 0.4.2's `convert.py` with torch on x86-64.
#[test]
fn the_bytes_are_those_of_convert_py() {
    let mut ramp: Vec<f32> = (0..32)
        .map(|i| (f64::from((i * 37 + 11) % 64 - 29) / 17.0) as f32)
        .collect();
    ramp[5] = 0.0;
    ramp[9] = -0.0;
    let halves: Vec<f32> = [-8.0]
        .into_iter()
        .chain((0..31).map(|i| -7.5 + 0.5 * i as f32))
        .collect();
    let tiny: Vec<f32> = ramp.iter().map(|x| x * 1e-7).collect();
    for (name, dtype, kind, want) in [
        (
            "ramp",
            DType::F32,
            GgmlType::Q4_0,
            "88b38cf36ad148a8158ce258c037ae047be2",
        ),
        (
            "ramp",
            DType::F32,
            GgmlType::Q4_1,
            "a833d3be730c952ec857ea731da73fc862fb841d",
        ),
        (
            "ramp",
            DType::F32,
            GgmlType::Q5_0,
            "88afa552ab9519e6c4a27f402a08d5a0806e3b08e6c4",
        ),
        (
            "ramp",
            DType::F32,
            GgmlType::Q5_1,
            "682fd3be5aad546ae6083b5d80afd5f72a4f7f91c4e6193b",
        ),
        (
            "ramp",
            DType::F32,
            GgmlType::Q8_0,
            "9723b94be073080030c457007f14a93cd063f88d20b547dc6f04992cc053e87b10a5",
        ),
        (
            "ramp",
            DType::F16,
            GgmlType::Q4_0,
            "88b38cf36ad148a8158ce358c037ae047be2",
        ),
        (
            "ramp",
            DType::F16,
            GgmlType::Q4_1,
            "a933d3be730c952ec857ea731da73fc862fb841d",
        ),
        (
            "ramp",
            DType::F16,
            GgmlType::Q5_0,
            "88afa552ab9519e7c4a27f402a08d5a0806e3b18e6c4",
        ),
        (
            "ramp",
            DType::F16,
            GgmlType::Q5_1,
            "692fd3be5aad546ae6083b5d80afd5f72a4f7f91c4e6193b",
        ),
        (
            "ramp",
            DType::F16,
            GgmlType::Q8_0,
            "9723b94be073080030c457007f14a93cd063f88d20b547dc6f04992cc053e87b10a5",
        ),
        (
            "halves",
            DType::F32,
            GgmlType::Q4_0,
            "003c808091a2a2a2b3c4c4c4d5e6e6e6f7f8",
        ),
        (
            "halves",
            DType::F32,
            GgmlType::Q4_1,
            "223c00c880809191a2a2b3b3c4c4d5d5e6e6f7f7",
        ),
        (
            "halves",
            DType::F32,
            GgmlType::Q5_0,
            "00380000ffff00112233445566778899aabbccddeeff",
        ),
        (
            "halves",
            DType::F32,
            GgmlType::Q5_1,
            "003800c80000ffff00112233445566778899aabbccddeeff",
        ),
        (
            "halves",
            DType::F32,
            GgmlType::Q8_0,
            "082c81899199a1a9b1b9c0c8d0d8e0e8f0f8000810182028303840474f575f676f77",
        ),
        (
            "halves",
            DType::F16,
            GgmlType::Q4_0,
            "003c808091a2a2a2b3c4c4c4d5e6e6e6f7f8",
        ),
        (
            "halves",
            DType::F16,
            GgmlType::Q4_1,
            "223c00c880809191a2a2b3b3c4c4d5d5e6e6f7f7",
        ),
        (
            "halves",
            DType::F16,
            GgmlType::Q5_0,
            "00380000ffff00112233445566778899aabbccddeeff",
        ),
        (
            "halves",
            DType::F16,
            GgmlType::Q5_1,
            "003800c80000ffff00112233445566778899aabbccddeeff",
        ),
        (
            "halves",
            DType::F16,
            GgmlType::Q8_0,
            "082c81899199a1a9b1b9c0c8d0d8e0e8f0f8000810182028303840474f575f676f77",
        ),
        (
            "tiny",
            DType::F32,
            GgmlType::Q4_0,
            "00808cf36ad138a8158ce258c037ae047be2",
        ),
        (
            "tiny",
            DType::F32,
            GgmlType::Q4_1,
            "00000380730c952ec857ea731da73fc862fb841d",
        ),
        (
            "tiny",
            DType::F32,
            GgmlType::Q5_0,
            "0080a552ab9519e6c4a27f402a08d5a0805e3b08e6c3",
        ),
        (
            "tiny",
            DType::F32,
            GgmlType::Q5_1,
            "000003805aad546ae6083b5d80afd5f72a4f7f91c4e6193b",
        ),
        (
            "tiny",
            DType::F32,
            GgmlType::Q8_0,
            "0000b94be073080030c457007f14a93cd063f88d20b547dc6f04992cc053e87b10a5",
        ),
        (
            "tiny",
            DType::F16,
            GgmlType::Q4_0,
            "00800ff00ff000f0000ff000f000ff000ff0",
        ),
        (
            "tiny",
            DType::F16,
            GgmlType::Q4_1,
            "00000380ff0fffffffffffff0fffffffffffffff",
        ),
        (
            "tiny",
            DType::F16,
            GgmlType::Q5_0,
            "008085502a950ff00ff000f0000ff000f000ff000ff0",
        ),
        (
            "tiny",
            DType::F16,
            GgmlType::Q5_1,
            "00000380fffffdfeff0fffffffffffff0fffffffffffffff",
        ),
        (
            "tiny",
            DType::F16,
            GgmlType::Q8_0,
            "0000807f807f00007f807f007f00807f807f00807f807f807f00807f807f807f0080",
        ),
    ] {
        let values = match name {
            "ramp" => &ramp,
            "halves" => &halves,
            _ => &tiny,
        };
        let tensor = Tensor::from_slice(values, [1, 32]).to_dtype(dtype);
        let hex: String = encoded(kind, &tensor)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        assert_eq!(hex, want, "{name} {dtype} {kind}");
    }
}

#[test]
fn blocks_without_extent_keep_their_value() {
    for dtype in [DType::F32, DType::F16] {
        for kind in QUANTIZED {
            let zeros = Tensor::zeros(dtype, [1, 64]);
            assert!(decoded(kind, &encoded(kind, &zeros)).iter().all(|&x| x == 0.0));
        }
        for kind in [GgmlType::Q4_1, GgmlType::Q5_1] {
            let same = Tensor::from_slice(&[1.5f32; 32], [1, 32]).to_dtype(dtype);
            assert_eq!(decoded(kind, &encoded(kind, &same)), [1.5; 32]);
        }
    }
}

/// The element of the largest magnitude gets the end that exists: the code 0.
#[test]
fn the_largest_may_be_negative() {
    for sign in [1f32, -1.0] {
        let mut values = [0.25 * sign; 32];
        values[17] = -4.0 * sign;
        let tensor = Tensor::from_slice(&values, [1, 32]);
        let block = encoded(GgmlType::Q4_0, &tensor);
        assert_eq!(half_at(&block, 0), 0.5 * sign);
        assert_eq!(
            block[2 + 1],
            0x08,
            "code 8 (a half goes to even) below, code 0 above"
        );
        assert_eq!(decoded(GgmlType::Q4_0, &block)[17], -4.0 * sign);
    }
}

#[test]
fn floats_are_kept() {
    let source = random(4, 50);
    assert_eq!(encoded(GgmlType::F32, &source), source.bytes());
    let half = source.to_dtype(DType::F16);
    assert_eq!(encoded(GgmlType::F16, &source), half.bytes());
    assert_eq!(encoded(GgmlType::F16, &half), half.bytes());
    assert_eq!(
        decoded(GgmlType::F16, half.bytes()),
        half.to_dtype(DType::F32).as_slice::<f32>()
    );
}

#[test]
fn pieces_are_the_whole() {
    let source = random(48, 4096);
    for kind in GgmlType::ALL {
        let mut pieces = Vec::new();
        for first in [0, 7, 40] {
            let last = if first == 0 {
                7
            } else if first == 7 {
                40
            } else {
                48
            };
            kind.encode("w", &source.rows(first..last), first, &mut pieces)
                .unwrap();
        }
        assert_eq!(encoded(kind, &source), pieces, "{kind}");
        assert_eq!(pieces.len(), kind.bytes(source.elements()));
    }
}

#[test]
fn bits_do_not_depend_on_threads() {
    let source = random(5, 32 * 1024);
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| GgmlType::ALL.map(|kind| encoded(kind, &source)))
    };
    assert_eq!(with(1), with(3));
}

#[test]
fn rounding_to_float16_is_the_processors() {
    let stream = Stream::new(3, 0);
    let mut values: Vec<f32> = (0..20_000u64)
        .map(|i| stream.normal(i) * 2f32.powi((i % 44) as i32 - 27))
        .collect();
    for half in 0..0x7c00u16 {
        let (low, high) = (f16::from_bits(half).to_f32(), f16::from_bits(half + 1).to_f32());
        if high.is_finite() {
            // A tie, and its neighbours on both sides.
            let middle = (low + high) / 2.0;
            values.extend([low, middle, middle.next_up(), middle.next_down(), -middle]);
        }
    }
    values.extend([65519.0, 65520.0, -65520.0, 1e9, 0.0, -0.0]);
    for x in values {
        let (got, want) = (<f16 as Arithmetic>::rounded(x), f16::from_f32(x).to_f32());
        assert_eq!(got.to_bits(), want.to_bits(), "{x}");
    }
}

#[test]
fn a_weight_that_cannot_be_kept_is_named() {
    for kind in GgmlType::ALL {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let mut source = random(4, 64).to_dtype(DType::F32);
                source.as_mut_slice::<f32>()[2 * 64 + 41] = bad;
                let source = source.to_dtype(dtype);
                let error = kind.encode("file: w", &source, 10, &mut Vec::new()).unwrap_err();
                assert!(error.to_string().contains("file: w[12, 41]"), "{kind} {error}");
            }
        }
        let mut large = random(4, 64);
        large.as_mut_slice::<f32>()[3 * 64 + 1] = -1e7;
        let result = kind.encode("w", &large, 0, &mut Vec::new());
        let held = matches!(kind, GgmlType::F32);
        assert_eq!(result.is_ok(), held, "{kind}");
        if let Err(error) = result {
            let text = error.to_string();
            assert!(
                text.contains("w[3, 1]") && text.contains("export it as f32"),
                "{text}"
            );
        }
    }
}
