//! Learning-rate schedules against the table made with transformers.

use glmtune::schedule::{Schedule, Scheduler};

use crate::common::{assert_close, golden};

#[test]
fn learning_rates_are_those_of_transformers() {
    let Some(path) = golden("chatglm_v1/trajectories/lr_schedules.json") else {
        return;
    };
    let table: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let base = table["base_lr"].as_f64().unwrap();
    let mut checked = 0;
    for (key, rates) in table["lr_of_step"].as_object().unwrap() {
        // "cosine/warmup3/total20"
        let parts: Vec<&str> = key.split('/').collect();
        let scheduler = Scheduler::ALL
            .into_iter()
            .find(|s| s.name() == parts[0])
            .unwrap_or_else(|| panic!("{key}: a schedule that glmtune does not have"));
        let number = |part: &str, prefix: &str| part.strip_prefix(prefix).unwrap().parse::<u64>().unwrap();
        let schedule = Schedule {
            scheduler,
            base,
            warmup_steps: number(parts[1], "warmup"),
            total_steps: number(parts[2], "total"),
        };
        let want: Vec<f64> = rates
            .as_array()
            .unwrap()
            .iter()
            .map(|r| r.as_f64().unwrap())
            .collect();
        let got: Vec<f64> = (0..want.len() as u64)
            .map(|update| schedule.rate(update))
            .collect();
        assert_close(key, &got, &want, 1e-18, 1e-9);
        checked += 1;
    }
    assert!(checked >= 6, "only {checked} schedules in the table");
}
