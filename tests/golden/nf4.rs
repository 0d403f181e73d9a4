//! NF4 and FP4 against bitsandbytes: every case of the set's `nf4/` files, its serialised layers, a whole 4-bit
//! checkpoint and the base weights of the QLoRA run.

use std::collections::BTreeMap;
use std::path::Path;

use glmtune::checkpoint::quantized::{CACHE_FILE, is_quantized_linear, quantize_checkpoint};
use glmtune::checkpoint::{Checkpoint, LM_HEAD, read_tensors};
use glmtune::error::{Error, Result};
use glmtune::quant::{Absmax, QuantTensor, QuantType};
use glmtune::tensor::{DType, Tensor};

use crate::common::{assert_close, golden, read_safetensors, tolerance};

type Tensors = BTreeMap<String, Tensor>;

const KINDS: [QuantType; 2] = [QuantType::Nf4, QuantType::Fp4];

/// `nf4/<type>_<dtype>.safetensors` with the file that holds its inputs.
struct Cases {
    file: String,
    quant_type: QuantType,
    want: Tensors,
    inputs: Tensors,
}

impl Cases {
    fn all() -> Vec<Cases> {
        let mut all = Vec::new();
        for quant_type in KINDS {
            for dtype in ["f32", "f16", "bf16"] {
                let file = format!("nf4/{quant_type}_{dtype}.safetensors");
                let Some(path) = golden(&file) else { continue };
                // FP4 files leave the inputs out: they are those of NF4.
                let Some(inputs) = golden(&format!("nf4/nf4_{dtype}.safetensors")) else {
                    continue;
                };
                let (want, inputs) = (read_safetensors(&path), read_safetensors(&inputs));
                all.push(Cases {
                    file,
                    quant_type,
                    want,
                    inputs,
                });
            }
        }
        all
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.want.keys().filter_map(|key| key.strip_suffix(".packed"))
    }

    fn input(&self, case: &str) -> &Tensor {
        &self.inputs[&format!("{case}.input")]
    }

    fn want(&self, case: &str, what: &str) -> Option<&Tensor> {
        self.want.get(&format!("{case}.{what}"))
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn nibbles(codes: &[u8]) -> impl Iterator<Item = usize> {
    codes
        .iter()
        .flat_map(|byte| [usize::from(byte >> 4), usize::from(byte & 15)])
}

/// Codes must be equal; in the case built on the very midpoints the neighbouring value will do (1 ulp of the scaled
/// weight decides there), and of FP4's two zeros either.
fn assert_codes(what: &str, quant_type: QuantType, case: &str, got: &[u8], want: &[u8]) {
    assert_eq!(got.len(), want.len(), "{what}: bytes of codes");
    let table = quant_type.table();
    let mut sorted = *table;
    sorted.sort_by(f32::total_cmp);
    let rank = |code: usize| {
        sorted
            .iter()
            .position(|v| *v == table[code])
            .expect("a value of the table")
    };
    for (i, (g, w)) in nibbles(got).zip(nibbles(want)).enumerate() {
        let apart = sorted[rank(g).min(rank(w))..rank(g).max(rank(w))]
            .windows(2)
            .filter(|p| p[0] != p[1])
            .count();
        let equal = g == w || table[g] == table[w] || (case == "nf4_thresholds" && apart <= 1);
        assert!(equal, "{what}: code {i} is {g}, want {w}");
    }
}

/// `got` and `want` of a 16-bit type differ by one step at most; f32 by the manifest's rtol.
fn assert_dequantised(what: &str, got: &Tensor, want: &Tensor) {
    let rtol = match want.dtype() {
        DType::F32 => 1e-6,
        DType::F16 => 1.0 / 1024.0,
        DType::BF16 => 1.0 / 128.0,
        other => panic!("{what}: {other}"),
    };
    let atol = if want.dtype() == DType::F16 { 6e-8 } else { 0.0 };
    assert_close(
        what,
        &got.to_dtype(want.dtype()).to_f64_vec(),
        &want.to_f64_vec(),
        atol,
        rtol,
    );
}

#[test]
fn tables_are_those_of_bitsandbytes() {
    let noise = Tensor::from_slice(&[1.0f32, -0.5, 0.25], [3]);
    for cases in Cases::all() {
        let q = QuantTensor::quantize(&noise, cases.quant_type, true).unwrap();
        assert_eq!(
            bits(q.table()),
            bits(cases.want["code_4bit"].as_slice()),
            "{}",
            cases.file
        );
        let Absmax::Nested { code, .. } = &q.absmax else {
            panic!("asked for double quantisation")
        };
        assert_eq!(
            bits(code.as_slice()),
            bits(cases.want["code_8bit_dynamic"].as_slice()),
            "{}",
            cases.file
        );
    }
}

#[test]
fn codes_scales_and_values_are_those_of_bitsandbytes() {
    for cases in Cases::all() {
        let mut seen = 0;
        for case in cases.names() {
            let what = format!("{} {case}", cases.file);
            let q = QuantTensor::quantize_named(&what, cases.input(case), cases.quant_type, false).unwrap();
            let want = |part: &str| {
                cases
                    .want(case, part)
                    .unwrap_or_else(|| panic!("{what}: no {part}"))
            };
            assert_codes(
                &what,
                cases.quant_type,
                case,
                q.codes.as_slice(),
                want("packed").as_slice(),
            );
            assert_eq!(
                bits(&q.block_absmax()),
                bits(want("absmax").as_slice()),
                "{what}: absmax"
            );
            if case != "nf4_thresholds" {
                assert_dequantised(&what, &q.dequantize(), want("dequant"));
            }
            seen += 1;
        }
        assert!(seen > 0, "{} holds no case", cases.file);
    }
}

#[test]
fn double_quantisation_is_that_of_bitsandbytes() {
    let (mut codes_seen, mut codes_apart) = (0, 0);
    for cases in Cases::all() {
        let offset_rtol = tolerance(&cases.file)["dq.offset"]["rtol"].as_f64().unwrap();
        let absmax_rtol = tolerance(&cases.file)["dq.absmax_f32"]["rtol"].as_f64().unwrap();
        for case in cases.names() {
            let what = format!("{} {case}", cases.file);
            let want = |part: &str| {
                cases
                    .want(case, part)
                    .unwrap_or_else(|| panic!("{what}: no {part}"))
            };
            let want_offset = want("dq.offset").as_slice::<f32>()[0];
            let q = match QuantTensor::quantize_named(&what, cases.input(case), cases.quant_type, true) {
                Ok(q) => q,
                Err(error) => {
                    // The one thing we refuse and bitsandbytes does not: a mean that is no number any more.
                    assert!(!want_offset.is_finite(), "{error}");
                    continue;
                }
            };
            let Absmax::Nested {
                codes,
                nested_absmax,
                offset,
                code,
            } = &q.absmax
            else {
                panic!("{what}")
            };
            assert_close(
                &what,
                &[f64::from(*offset)],
                &[f64::from(want_offset)],
                0.0,
                offset_rtol,
            );
            let want_nested = want("dq.nested_absmax").to_f64_vec();
            let scale = f64::from(want_offset.abs()) * offset_rtol;
            assert_close(
                &what,
                &nested_absmax.to_f64_vec(),
                &want_nested,
                scale,
                offset_rtol,
            );
            let (got_codes, want_codes) = (codes.as_slice::<u8>(), want("dq.absmax_u8").as_slice::<u8>());
            assert_eq!(got_codes.len(), want_codes.len(), "{what}: nested codes");
            assert!(
                got_codes.iter().zip(want_codes).all(|(g, w)| g.abs_diff(*w) <= 1),
                "{what}: nested codes"
            );
            codes_seen += got_codes.len();
            codes_apart += got_codes.iter().zip(want_codes).filter(|(g, w)| g != w).count();

            // Given bitsandbytes' own codes, the scales and weights follow.
            let theirs = QuantTensor {
                codes: Tensor::from_slice(want("packed").as_slice::<u8>(), [want("packed").elements()]),
                absmax: Absmax::Nested {
                    codes: want("dq.absmax_u8").clone(),
                    nested_absmax: want("dq.nested_absmax").clone(),
                    offset: want_offset,
                    code: code.clone(),
                },
                ..q
            };
            let restored: Vec<f64> = theirs.block_absmax().iter().map(|x| f64::from(*x)).collect();
            assert_close(
                &what,
                &restored,
                &want("dq.absmax_f32").to_f64_vec(),
                0.0,
                absmax_rtol,
            );
            if let Some(want) = cases.want(case, "dq.dequant") {
                assert_dequantised(&what, &theirs.dequantize(), want);
            }
        }
    }
    println!("{codes_apart} of {codes_seen} nested codes differ from bitsandbytes'");
    assert!(
        codes_apart * 100 <= codes_seen,
        "{codes_apart} of {codes_seen} nested codes differ: more than 1 %"
    );
}

fn weight_of(tensors: &Tensors) -> String {
    let state = tensors
        .keys()
        .find(|key| key.contains(".quant_state."))
        .expect("a 4-bit weight");
    QuantTensor::described_weight(state).unwrap().to_string()
}

fn read_weight(tensors: &Tensors, name: &str) -> Result<QuantTensor> {
    QuantTensor::from_bnb(name, |key| {
        tensors
            .get(key)
            .cloned()
            .ok_or_else(|| Error::input(key, "nothing", "a tensor", "-"))
    })
}

#[test]
fn serialised_layers_are_read_and_written_to_the_byte() {
    for quant_type in KINDS {
        for double in ["", "_double"] {
            let Some(path) = golden(&format!("nf4/linear4bit_{quant_type}{double}.safetensors")) else {
                continue;
            };
            let Some(dequant) = golden(&format!(
                "nf4/linear4bit_{quant_type}{double}_dequant.safetensors"
            )) else {
                continue;
            };
            let tensors = read_tensors(&path).unwrap();
            let name = weight_of(&tensors);
            let weight = read_weight(&tensors, &name).unwrap();
            assert_eq!(
                weight.codes.owned_bytes(),
                0,
                "codes are used where the file stores them"
            );
            let dequant = read_safetensors(&dequant);
            // As numbers: FP4 has two zeros, and bitsandbytes gives one of them a sign that its own table lacks.
            let (got, want) = (weight.dequantize().to_dtype(DType::F16), &dequant["dequant"]);
            assert!(
                got.to_f64_vec() == want.to_f64_vec(),
                "{quant_type}{double}: {name} dequantised"
            );

            let written: Tensors = weight.to_bnb(&name).into_iter().collect();
            let described =
                |key: &&String| key.as_str() == name || QuantTensor::described_weight(key).is_some();
            assert!(
                written.keys().eq(tensors.keys().filter(described)),
                "{quant_type}{double}: keys"
            );
            for (key, tensor) in &written {
                assert_eq!(tensor.shape(), tensors[key].shape(), "{key}");
                assert_eq!(tensor.bytes(), tensors[key].bytes(), "{key}");
            }
        }
    }
}

/// The set's 4-bit checkpoint against our own of the fp16 checkpoint it was made from.
#[test]
fn whole_checkpoint_is_that_of_bitsandbytes() {
    let Some(want_dir) = golden("nf4/chatglm_v1_bnb_nf4_double") else {
        return;
    };
    let Some(source_dir) = golden("chatglm_v1/checkpoint_fp16_bin") else {
        return;
    };
    let want = Checkpoint::open(&want_dir).unwrap();
    want.validate().unwrap();
    let source = Checkpoint::open(&source_dir).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let ours_dir = scratch.path().join("nf4");
    quantize_checkpoint(&source, &ours_dir, QuantType::Nf4, true, &mut |_, _, _| Ok(())).unwrap();
    assert!(ours_dir.join(CACHE_FILE).exists());
    let ours = Checkpoint::open(&ours_dir).unwrap();
    ours.validate().unwrap();
    compare_checkpoints(&ours, &want, &ours_dir);
}

fn compare_checkpoints(ours: &Checkpoint, want: &Checkpoint, dir: &Path) {
    let (mut seen, mut apart) = (0, 0);
    for name in want.names().filter(|name| !name.ends_with(".inv_freq")) {
        if name == LM_HEAD && !ours.contains(name) {
            assert!(
                ours.config().tie_word_embeddings,
                "{}: a head left out is tied",
                dir.display()
            );
            continue;
        }
        let (got, want) = (ours.tensor(name).unwrap(), want.tensor(name).unwrap());
        assert_eq!(got.dtype(), want.dtype(), "{name}");
        if name.contains(".quant_state.") {
            let json = |t: &Tensor| serde_json::from_slice::<serde_json::Value>(t.bytes()).unwrap();
            let (mut got, mut want) = (json(&got), json(&want));
            let offset = |v: &mut serde_json::Value| v["nested_offset"].take().as_f64().unwrap();
            assert_close(name, &[offset(&mut got)], &[offset(&mut want)], 0.0, 1e-6);
            assert_eq!(got, want, "{name}");
        } else if name.ends_with(".absmax") && got.dtype() == DType::U8 {
            assert!(
                got.bytes()
                    .iter()
                    .zip(want.bytes())
                    .all(|(g, w)| g.abs_diff(*w) <= 1),
                "{name}"
            );
            seen += got.elements();
            apart += got
                .bytes()
                .iter()
                .zip(want.bytes())
                .filter(|(g, w)| g != w)
                .count();
        } else if name.ends_with(".nested_absmax") {
            assert_close(name, &got.to_f64_vec(), &want.to_f64_vec(), 1e-6, 1e-6);
        } else {
            assert_eq!(got.shape(), want.shape(), "{name}");
            assert!(got.bytes() == want.bytes(), "{name}: bytes differ");
        }
    }
    assert!(seen > 0, "no 4-bit weights compared");
    assert!(
        apart * 100 <= seen,
        "{apart} of {seen} nested codes differ: more than 1 %"
    );
    println!("{apart} of {seen} nested codes of the checkpoint differ from bitsandbytes'");
}

#[test]
fn base_weights_of_the_qlora_run_are_our_dequantisation() {
    let file = "nf4/qlora_base_dequant_f32.safetensors";
    let Some(path) = golden(file) else { return };
    let Some(source_dir) = golden("chatglm_v1/checkpoint_fp32_safetensors") else {
        return;
    };
    let source = Checkpoint::open(&source_dir).unwrap();
    let rtol = tolerance(file)["rtol"].as_f64().unwrap();
    for (name, want) in read_safetensors(&path) {
        assert!(is_quantized_linear(&name), "{name}");
        let weight = source.tensor(&name).unwrap();
        let got = QuantTensor::quantize(&weight, QuantType::Nf4, true)
            .unwrap()
            .dequantize();
        assert_close(&name, &got.to_f64_vec(), &want.to_f64_vec(), 0.0, rtol);
    }
}
