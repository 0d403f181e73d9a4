use super::*;
use crate::rng::Stream;

fn noise(n: usize) -> Vec<f32> {
    let stream = Stream::new(7, 1);
    (0..n as u64).map(|i| stream.normal(i)).collect()
}

fn every_kind() -> impl Iterator<Item = (QuantType, bool)> {
    [QuantType::Nf4, QuantType::Fp4]
        .into_iter()
        .flat_map(|t| [(t, false), (t, true)])
}

/// No code of the table may be nearer to the scaled weight than the one chosen (but for rounding at the midpoint).
#[test]
fn every_code_is_the_nearest() {
    let weights = noise(64 * 9 + 17);
    let source = Tensor::from_slice(&weights, [weights.len()]);
    for (quant_type, _) in every_kind() {
        let quantized = QuantTensor::quantize(&source, quant_type, false).unwrap();
        let absmax = quantized.block_absmax();
        let back = quantized.dequantize();
        for (i, (&w, &b)) in weights.iter().zip(back.as_slice::<f32>()).enumerate() {
            let scale = absmax[i / BLOCK];
            let nearest = quant_type
                .table()
                .iter()
                .map(|t| (t * scale - w).abs())
                .fold(f32::INFINITY, f32::min);
            assert!(
                (b - w).abs() <= nearest + 1e-6 * scale,
                "{quant_type} element {i}: {w} became {b}"
            );
        }
    }
}

#[test]
fn a_tail_block_and_an_odd_count_keep_their_sizes() {
    for n in [1usize, 2, 63, 64, 65, 127, 128, 129, 64 * 256 + 1] {
        let source = Tensor::from_slice(&noise(n), [n]);
        for (quant_type, double_quant) in every_kind() {
            let q = QuantTensor::quantize(&source, quant_type, double_quant).unwrap();
            assert_eq!(q.codes.elements(), n.div_ceil(2));
            assert_eq!(q.block_absmax().len(), n.div_ceil(BLOCK));
            assert_eq!(q.dequantize().elements(), n);
        }
    }
}

#[test]
fn threads_do_not_change_the_result() {
    let n = 64 * 5000 + 5;
    let source = Tensor::from_slice(&noise(n), [n]);
    let bits = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let q = QuantTensor::quantize(&source, QuantType::Nf4, true).unwrap();
            (
                q.codes.bytes().to_vec(),
                q.block_absmax(),
                q.dequantize().bytes().to_vec(),
            )
        })
    };
    assert!(bits(1) == bits(3));
}

#[test]
fn zero_blocks_stay_zero() {
    let mut weights = noise(64 * 4);
    weights[64..128].fill(0.0);
    let source = Tensor::from_slice(&weights, [4, 64]);
    for (quant_type, double_quant) in every_kind() {
        let back = QuantTensor::quantize(&source, quant_type, double_quant)
            .unwrap()
            .dequantize();
        assert!(
            back.as_slice::<f32>()[64..128].iter().all(|&x| x == 0.0),
            "{quant_type} {double_quant}"
        );
    }
}

#[test]
fn a_weight_that_is_not_a_number_is_named() {
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0usize, 63, 100, 199] {
            let mut weights = noise(200);
            weights[place] = bad;
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let source = Tensor::from_slice(&weights, [10, 20]).to_dtype(dtype);
                let error =
                    QuantTensor::quantize_named("model.bin: w", &source, QuantType::Nf4, true).unwrap_err();
                let named = format!("model.bin: w[{}, {}]", place / 20, place % 20);
                assert!(error.to_string().starts_with(&named), "{error}");
            }
        }
    }
    let huge = Tensor::from_slice(&[3e38f32; 640], [640]);
    assert!(
        QuantTensor::quantize(&huge, QuantType::Nf4, true).is_err(),
        "the mean of the scales overflows"
    );
    assert!(QuantTensor::quantize(&huge, QuantType::Nf4, false).is_ok());
}

#[test]
fn bnb_layout_round_trips_and_refuses_what_does_not_fit() {
    use std::collections::BTreeMap;
    let source = Tensor::from_slice(&noise(6 * 130), [6, 130]).to_dtype(DType::BF16);
    for (quant_type, double_quant) in every_kind() {
        let q = QuantTensor::quantize(&source, quant_type, double_quant).unwrap();
        let tensors: BTreeMap<String, Tensor> = q.to_bnb("m.weight").into_iter().collect();
        let read = |tensors: &BTreeMap<String, Tensor>| {
            QuantTensor::from_bnb("m.weight", |key| {
                tensors
                    .get(key)
                    .cloned()
                    .ok_or_else(|| Error::input(key, "nothing", "a tensor", "-"))
            })
        };
        let back = read(&tensors).unwrap();
        assert_eq!(
            (back.shape, back.source_dtype, back.quant_type),
            (q.shape, q.source_dtype, quant_type)
        );
        assert_eq!(back.dequantize().bytes(), q.dequantize().bytes());
        for key in tensors.keys() {
            assert!(
                key == "m.weight" || QuantTensor::described_weight(key) == Some("m.weight"),
                "{key}"
            );
            let mut damaged = tensors.clone();
            let removed = damaged.remove(key).unwrap();
            let error = read(&damaged).unwrap_err().to_string();
            assert!(error.contains("m.weight"), "{error}");
            let short = Tensor::zeros(removed.dtype(), [removed.elements() - 1]);
            damaged.insert(key.clone(), short);
            let error = read(&damaged).unwrap_err().to_string();
            assert!(error.starts_with(key), "{key} shortened: {error}");
        }
        let state_key = format!("m.weight.quant_state.bitsandbytes__{quant_type}");
        let state = String::from_utf8(tensors[&state_key].bytes().to_vec()).unwrap();
        for (from, to) in [
            ("\"blocksize\": 64", "\"blocksize\": 128"),
            ("[6, 130]", "[6, 131]"),
            ("[6, 130]", "[4294967296, 4294967296, 4294967296]"),
            ("[6, 130]", "[0, 130]"),
            ("[6, 130]", "[1, 1, 1, 6, 130]"),
            ("bfloat16", "int8"),
            ("{", "["),
        ] {
            let changed = state.replacen(from, to, 1);
            assert_ne!(changed, state);
            let mut damaged = tensors.clone();
            damaged.insert(
                state_key.clone(),
                Tensor::from_slice(changed.as_bytes(), [changed.len()]),
            );
            assert!(read(&damaged).is_err(), "{from} -> {to}");
        }
    }
}
