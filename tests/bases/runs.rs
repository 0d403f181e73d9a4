//! The program on a base in few bits: a run and its plan, resumed, its answers, and what is refused.

use glmtune::model::config::{Linears, ModelConfig};
use serde_json::Value;

use crate::common::{cuda_device, read_safetensors};
use crate::folders::{self, LAYOUTS, Layout, Tensors};
use crate::program::{Workplace, fails, glmtune, str, succeeds, text};

/// The model of a workplace as `layout` has it.
fn convert(place: &Workplace, layout: Layout) {
    let dir = place.model();
    let path = dir.join("model.safetensors");
    let mut tensors = Tensors::new();
    for (name, tensor) in read_safetensors(&path) {
        match folders::is_linear(&name) {
            true => tensors.extend(folders::quantized(layout, &name, &tensor).0),
            false => drop(tensors.insert(name, tensor)),
        }
    }
    std::fs::remove_file(&path).unwrap();
    let config = ModelConfig::read(&dir).unwrap();
    folders::write(&dir, &config, &folders::keys(layout), &tensors);
}

fn workplace(layout: Layout) -> Option<Workplace> {
    let place = Workplace::new()?;
    let config = ModelConfig::read(&place.model()).unwrap();
    if !config.hidden_size.is_multiple_of(64) {
        eprintln!("SKIPPED: models/tiny-glm is not there, and the random model is too narrow");
        return None;
    }
    convert(&place, layout);
    Some(place)
}

fn form(layout: Layout) -> &'static str {
    match layout {
        Layout::ThudmInt4 => "4 bits with a scale for each row",
        Layout::ThudmInt8 | Layout::BnbInt8 => "8 bits with a scale for each row",
    }
}

/// What a run says of its base.
fn said(layout: Layout) -> String {
    let form = form(layout);
    format!("base: its linears are stored in {form}, and are used as they are")
}

/// A run `whole`, and one that was cut off after its second step: it goes on to the same bits.
fn trains_and_resumes(place: &Workplace, layout: Layout, device: &[&str]) {
    let lora = ["--method", "lora", "--max-steps", "4", "--max-length", "24"];
    let flags = [&lora, device].concat();
    let log = succeeds(&place.train("whole", &flags).output().unwrap());
    assert!(
        log.contains(&said(layout)) && !log.contains("please report it"),
        "{log}"
    );
    let cut = place.path("cut");
    succeeds(&place.train("cut", &flags).output().unwrap());
    std::fs::remove_dir_all(cut.join("checkpoints/step-000004")).unwrap();
    std::fs::remove_file(cut.join("adapter_model.safetensors")).unwrap();
    let mut resumed = glmtune(&["train", "--output", str(&cut), "--resume"]);
    let log = succeeds(&resumed.output().unwrap());
    assert!(log.contains("resumed from"), "{log}");
    assert!(
        place.adapter("whole") == place.adapter("cut"),
        "{layout:?}: the resumed run has other bits"
    );
}

/// What the greedy answer to a prompt is.
fn answer(place: &Workplace, adapter: &str, device: &[&str]) -> String {
    let (model, adapter) = (place.model(), place.path(adapter));
    let args = [
        "generate",
        "--prompt",
        "数到3",
        "--greedy",
        "--max-new-tokens",
        "4",
    ];
    let of = ["--model", str(&model), "--adapter", str(&adapter)];
    let output = glmtune(&[&args, &of[..], device].concat()).output().unwrap();
    let log = succeeds(&output);
    assert!(log.contains("as stored, in "), "{log}");
    text(&output.stdout)
}

fn trains_resumes_and_answers(layout: Layout) {
    let Some(place) = workplace(layout) else { return };
    trains_and_resumes(&place, layout, &[]);

    // QLoRA's own 4 bits would be those of another model: the base is what it is.
    let qlora = ["--method", "qlora", "--max-steps", "4", "--max-length", "24"];
    let log = succeeds(&place.train("qlora", &qlora).output().unwrap());
    assert!(
        log.contains(&said(layout)) && !log.contains("please report it"),
        "{log}"
    );
    assert!(
        place.adapter("whole") == place.adapter("qlora"),
        "{layout:?}: qlora is lora on another base"
    );
    assert!(!place.model().join("nf4-cache").exists());

    assert_eq!(answer(&place, "qlora", &[]), answer(&place, "whole", &[]));
    let (model, adapter, data) = (place.model(), place.path("qlora"), place.data());
    for args in [
        &["eval", "--data", str(&data), "--json", "--max-new-tokens", "2"][..],
        &["chat", "--greedy", "--max-new-tokens", "4"],
    ] {
        let of = ["--model", str(&model), "--adapter", str(&adapter)];
        succeeds(&glmtune(&[args, &of].concat()).output().unwrap());
    }
}

#[test]
fn a_run_on_int8_trains_resumes_and_answers() {
    trains_resumes_and_answers(Layout::ThudmInt8);
}

#[test]
fn a_run_on_int4_trains_resumes_and_answers() {
    trains_resumes_and_answers(Layout::ThudmInt4);
}

#[test]
fn a_run_on_eight_bits_of_bitsandbytes_trains_resumes_and_answers() {
    trains_resumes_and_answers(Layout::BnbInt8);
}

#[test]
fn a_device_trains_resumes_and_answers_on_whole_numbers() {
    if cuda_device().is_none() {
        return;
    }
    for layout in [Layout::ThudmInt8, Layout::ThudmInt4] {
        let Some(place) = workplace(layout) else { return };
        trains_and_resumes(&place, layout, &["--device", "cuda", "--dtype", "fp16"]);
        let exact = ["--device", "cuda", "--dtype", "fp32"];
        let [device, cpu] = [&exact[..], &["--device", "cpu"]].map(|device| answer(&place, "whole", device));
        assert_eq!(device, cpu, "{layout:?}: the answers of device and CPU differ");
    }
}

#[test]
fn what_needs_floats_says_so_and_inspecting_shows_what_there_is() {
    for layout in LAYOUTS {
        let Some(place) = workplace(layout) else { return };
        let model = place.model();
        for method in ["full", "freeze"] {
            let (data, output) = (place.data(), place.path("out"));
            let mut train = glmtune(&[
                "train",
                "--model",
                str(&model),
                "--data",
                str(&data),
                "--method",
                method,
            ]);
            let line = fails(&train.args(["--output", str(&output)]).output().unwrap(), 1);
            let bits = if layout == Layout::ThudmInt4 {
                "4 bits"
            } else {
                "8 bits"
            };
            assert!(
                line.contains(&format!("a weight in {bits}")) && line.contains("fp16"),
                "{line}"
            );
        }

        let output = glmtune(&["quantize", "--model", str(&model)]).output().unwrap();
        succeeds(&output);
        assert!(text(&output.stdout).contains("already in few bits, used as it is"));
        let other = place.path("other");
        let output = glmtune(&["quantize", "--model", str(&model), "--output", str(&other)])
            .output()
            .unwrap();
        let line = fails(&output, 1);
        assert!(
            line.contains(&format!("linears in {}", form(layout))) && !other.exists(),
            "{line}"
        );

        let output = glmtune(&["plan", "--model", str(&model), "--vram", "8GB"])
            .output()
            .unwrap();
        succeeds(&output);
        let output = glmtune(&["inspect", "--json", "--tensors", str(&model)])
            .output()
            .unwrap();
        succeeds(&output);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(
            report["kind"].as_str().unwrap().contains(form(layout)),
            "{report}"
        );
        let (rows, stored) = (
            report["tensors"].as_array().unwrap(),
            if layout == Layout::ThudmInt4 {
                "int4"
            } else {
                "int8"
            },
        );
        let few: Vec<&Value> = rows.iter().filter(|row| row["stored"] == stored).collect();
        assert_eq!(few.len(), 16, "{report}");
        let qkv = few
            .iter()
            .find(|row| row["name"] == "transformer.layers.0.attention.query_key_value.weight")
            .unwrap();
        assert_eq!(qkv["shape"], serde_json::json!([384, 128]));
        let bytes = match layout {
            Layout::ThudmInt8 => 384 * 128 + 384 * 2,
            Layout::ThudmInt4 => 384 * 64 + 384 * 2,
            Layout::BnbInt8 => 384 * 128 + 384 * 4 + 1,
        };
        assert_eq!(qkv["bytes"], bytes);
        assert!(
            report["complete"].as_str().unwrap().starts_with("yes"),
            "{report}"
        );
    }
}

/// A second run starts from a base into which the first one's adapter is merged, quantised again.
#[test]
fn adapters_are_merged_into_whole_numbers() {
    for layout in LAYOUTS {
        let Some(place) = workplace(layout) else { return };
        let flags = ["--method", "lora", "--max-steps", "2", "--max-length", "24"];
        succeeds(&place.train("first", &flags).output().unwrap());
        let first = place.path("first");
        let more = [&flags[..], &["--merge-adapters", str(&first)]].concat();
        let log = succeeds(&place.train("second", &more).output().unwrap());
        assert!(log.contains("merged "), "{log}");
    }
}

/// Merged into what the codes stand for, the result is a model in floats that is the trained one: verified, and loaded here.
#[test]
fn an_adapter_on_whole_numbers_is_merged_into_floats() {
    for layout in LAYOUTS {
        let Some(place) = workplace(layout) else { return };
        let qlora = ["--method", "qlora", "--max-steps", "2", "--max-length", "24"];
        succeeds(&place.train("run", &qlora).output().unwrap());
        let (model, adapter, merged) = (place.model(), place.path("run"), place.path("merged"));
        let args = ["merge", "--model", str(&model), "--adapter", str(&adapter)];
        let mut merge = glmtune(&args);
        succeeds(
            &merge
                .args(["--output", str(&merged), "--device", "cpu"])
                .output()
                .unwrap(),
        );
        let config = ModelConfig::read(&merged).unwrap();
        assert_eq!(config.linears(), Linears::Dense, "{layout:?}");
        let prompt = [
            "generate",
            "--prompt",
            "数到3",
            "--greedy",
            "--max-new-tokens",
            "4",
        ];
        let output = glmtune(&[&prompt[..], &["--model", str(&merged)]].concat())
            .output()
            .unwrap();
        succeeds(&output);
        assert_eq!(
            text(&output.stdout),
            answer(&place, "run", &["--device", "cpu"]),
            "{layout:?}"
        );
    }
}
