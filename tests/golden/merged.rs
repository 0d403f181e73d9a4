//! Merging against PEFT's `merge_and_unload`.

use glmtune::checkpoint::{Checkpoint, LM_HEAD, Source};
use glmtune::export::merged::{Held, Into, Merged};
use glmtune::model::tune::{Merger, Strength};
use glmtune::model::{LoadOptions, Model};

use crate::common::{assert_close, golden, read_safetensors, tolerance, values};
use crate::forward::batch;

#[test]
fn merged_weights_and_their_logits_are_those_of_peft() {
    let (Some(base), Some(adapter), Some(merged)) = (
        golden("chatglm_v1/checkpoint_fp32_safetensors"),
        golden("chatglm_v1/trajectories/lora_qkv/final_adapter"),
        golden("chatglm_v1/merged_lora_qkv"),
    ) else {
        return;
    };
    let base = Checkpoint::open(&base).unwrap();
    let strength = Strength {
        dir: &adapter,
        factor: 1.0,
    };
    let merger = Merger::open(base.config(), &[strength]).unwrap();
    let held = Held::new(&base, Into::Original, Vec::new()).unwrap();
    let ours = Merged::new(&held, &merger, None);
    let changed = read_safetensors(&merged.join("model.safetensors"));
    let of = tolerance("chatglm_v1/merged_lora_qkv/model.safetensors");
    let number = |t: &serde_json::Value, key: &str| t[key].as_f64().expect("a tolerance");
    let mut seen = 0;
    for (name, _) in base.config().tensors() {
        match changed.get(&name) {
            Some(want) => {
                seen += 1;
                let got = values(&ours.dense(&name).unwrap());
                assert!(merger.changes(&name), "{name}");
                assert_close(
                    &name,
                    &got,
                    &values(want),
                    number(&of, "atol"),
                    number(&of, "rtol"),
                );
            }
            None if name == LM_HEAD && !base.contains(&name) => {}
            None => {
                let got = ours.dense(&name).unwrap();
                assert_eq!(got.bytes(), base.tensor(&name).unwrap().bytes(), "{name}");
            }
        }
    }
    assert_eq!(seen, merger.changed().count());
    assert!(seen > 0);

    let Some(case) = golden("chatglm_v1/forward/train_rightpad.safetensors") else {
        return;
    };
    let batch = batch(&read_safetensors(&case));
    let model = Model::load_from(&ours, &LoadOptions::default()).unwrap();
    let mut ws = model.workspace(batch.size, batch.len).unwrap();
    model.forward(&mut ws, &batch, None).unwrap();
    let check = read_safetensors(&merged.join("check.safetensors"));
    let want = check.get("logits_merged").unwrap_or_else(|| {
        panic!("check.safetensors holds {:?}", check.keys());
    });
    let atol = number(&tolerance("chatglm_v1/merged_lora_qkv/check.safetensors"), "atol");
    assert_close(
        "logits",
        &values(&model.logits(&ws).unwrap()),
        &values(want),
        atol,
        0.0,
    );
}
