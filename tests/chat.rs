//! Is `glmtune chat` pleasant to a person at a terminal, and the same as ever to a pipe?
//!
//! The terminal is a real one: `script` (util-linux) makes a pseudo-terminal around the program, and what the program draws is read
//! as a terminal would show it.

#[path = "common/mod.rs"]
mod common;
#[path = "common/program.rs"]
mod program;

use std::io::{Read, Write};
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{golden, values};
use glmtune::checkpoint::Checkpoint;
use glmtune::data::batch::Batch;
use glmtune::data::collate;
use glmtune::model::tune::{self, Exchange, LoraConfig, PrefixConfig, SavedModule, Tuning};
use glmtune::model::{LoadOptions, Model};
use glmtune::tokenizer::Special;
use program::{Workplace, fails, glmtune, str, succeeds, text};
use serde_json::{Value, json};

/// A chat at a terminal.
struct Terminal {
    child: Child,
    input: Option<ChildStdin>,
    screen: Arc<Mutex<vt100::Parser>>,
}

fn size(extent: u16) -> NonZero<u16> {
    NonZero::new(extent).unwrap()
}

const TIMEOUT: Duration = Duration::from_secs(120);

impl Terminal {
    /// `None`, with a loud line, where there is no `script` of util-linux.
    fn open(place: &Workplace, (rows, columns): (u16, u16), extra: &str) -> Option<Self> {
        let version = Command::new("script").arg("--version").output();
        if !version.is_ok_and(|output| text(&output.stdout).contains("util-linux")) {
            eprintln!("SKIPPED: no `script` of util-linux to make a terminal with");
            return None;
        }
        let program = env!("CARGO_BIN_EXE_glmtune");
        let model = place.model();
        let chat = format!(
            "stty rows {rows} cols {columns}; exec '{program}' chat --model '{}' --device cpu --threads 1 {extra}",
            model.display()
        );
        let mut child = Command::new("script")
            .args(["--quiet", "--return", "--flush", "--command", &chat, "/dev/null"])
            .env("TERM", "xterm")
            .env("XDG_DATA_HOME", place.path("data-home"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let screen = Arc::new(Mutex::new(vt100::Parser::new(size(rows), size(columns), 0)));
        let (drawn, mut output) = (Arc::clone(&screen), child.stdout.take().unwrap());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = output.read(&mut bytes) {
                drawn.lock().unwrap().process(&bytes[..n]);
            }
        });
        let input = child.stdin.take();
        let mut terminal = Self { child, input, screen };
        terminal.prompt();
        Some(terminal)
    }

    fn send(&mut self, keys: &str) {
        let input = self.input.as_mut().unwrap();
        input
            .write_all(keys.as_bytes())
            .and_then(|()| input.flush())
            .unwrap();
    }

    /// Keys, then Enter, then waits for the next prompt.
    fn say(&mut self, keys: &str) {
        self.send(keys);
        self.wait("the keys are drawn", |screen| !at_prompt(screen));
        self.send("\r");
        self.prompt();
    }

    /// Waits until the cursor's line is this one.
    #[track_caller]
    fn line(&mut self, text: &str) {
        self.wait(text, |screen| cursor_line(screen) == text);
    }

    fn prompt(&mut self) {
        self.wait("a prompt", at_prompt);
    }

    #[track_caller]
    fn wait(&mut self, what: &str, done: impl Fn(&vt100::Screen) -> bool) {
        let begun = Instant::now();
        while !done(self.screen.lock().unwrap().screen()) {
            assert!(
                begun.elapsed() < TIMEOUT,
                "no {what}; the screen:\n{}",
                self.contents()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[track_caller]
    fn shows(&mut self, what: &str) {
        self.wait(what, |screen| screen.contents().contains(what));
    }

    fn contents(&self) -> String {
        self.screen.lock().unwrap().screen().contents()
    }

    fn cursor(&self) -> (u16, u16) {
        self.screen.lock().unwrap().screen().cursor_position()
    }

    /// The exit code, once the program has ended.
    #[track_caller]
    fn ended(&mut self) -> Option<i32> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(begun.elapsed() < TIMEOUT, "still there:\n{}", self.contents());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.input.take();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The line that the cursor stands in.
fn cursor_line(screen: &vt100::Screen) -> String {
    let (row, _) = screen.cursor_position();
    let line = screen.rows(0, screen.size().1.get()).nth(usize::from(row));
    line.unwrap_or_default().trim_end().to_string()
}

/// Does the cursor stand behind an empty prompt?
fn at_prompt(screen: &vt100::Screen) -> bool {
    screen.cursor_position().1 == 2 && cursor_line(screen) == ">"
}

const LEFT: &str = "\x1b[D";
const UP: &str = "\x1b[A";
const HOME: &str = "\x01";
const CTRL_C: &str = "\x03";
const CTRL_D: &str = "\x04";
const CTRL_U: &str = "\x15";

fn rows(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn chinese_is_typed_moved_over_wrapped_and_kept_for_the_next_time() {
    let Some(place) = Workplace::new() else { return };
    let saved = place.path("talk.jsonl");
    let short = "--max-new-tokens 3";
    let Some(mut terminal) = Terminal::open(&place, (12, 21), short) else {
        return;
    };
    // Wide characters take two columns, and one that does not fit the last column goes to the next line whole.
    let long = "春眠不觉晓处处闻啼鸟夜来风雨声";
    terminal.send(long);
    terminal.shows("> 春眠不觉晓处处闻啼\n鸟夜来风雨声");
    let (row, column) = terminal.cursor();
    assert_eq!(column, 2 * 6, "{}", terminal.contents());
    terminal.send(HOME);
    terminal.wait("the cursor at the first character", |s| {
        s.cursor_position() == (row - 1, 2)
    });
    terminal.send(CTRL_C);
    terminal.prompt();
    // Between two characters.
    terminal.send(&format!("数到{LEFT}错\x7f再"));
    terminal.line("> 数再到");
    terminal.wait("the cursor behind 再", |s| s.cursor_position().1 == 2 + 4);
    terminal.say("");
    // Two lines: one that ends in a backslash, and a pasted line break.
    terminal.send("一\\\r");
    terminal.send("二\x1b[200~三\n四\x1b[201~");
    terminal.say("");
    terminal.say(&format!("/save {}", saved.display()));
    let asked: Vec<Value> = rows(&saved)
        .into_iter()
        .map(|row| row["prompt"].clone())
        .collect();
    assert_eq!(asked, ["数再到", "一\n二三\n四"]);
    // The line before the line before, whose three lines the arrow goes through.
    terminal.send(&UP.repeat(5));
    terminal.line("> 数再到");
    terminal.send(CTRL_C);
    terminal.prompt();
    terminal.send(CTRL_D);
    assert_eq!(terminal.ended(), Some(0));
    drop(terminal);

    let mut next = Terminal::open(&place, (24, 80), short).unwrap();
    next.send(&UP.repeat(5));
    next.line("> 数再到");
    next.send(&format!("{CTRL_U}{CTRL_D}"));
    assert_eq!(next.ended(), Some(0));
    drop(next);
    let kept = place.path("data-home/glmtune/chat_history");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(&kept).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "nobody else reads what was asked");
    }
    let before = std::fs::read(&kept).unwrap();
    let mut without = Terminal::open(&place, (24, 80), &format!("{short} --no-history")).unwrap();
    without.send(UP);
    without.say("不留");
    without.send(CTRL_D);
    assert_eq!(without.ended(), Some(0));
    assert!(std::fs::read(&kept).unwrap() == before);
    drop(without);
    // What is damaged is kept beside, and a new file is begun.
    std::fs::write(&kept, b"#V2\n\xff\xfe\n").unwrap();
    let mut damaged = Terminal::open(&place, (24, 200), short).unwrap();
    damaged.shows("cannot be read: they are now in");
    damaged.say("新的");
    damaged.send(CTRL_D);
    assert_eq!(damaged.ended(), Some(0));
    drop(damaged);
    assert!(std::fs::read_to_string(&kept).unwrap().contains("新的"));
    let aside = kept.with_extension("damaged1");
    assert!(std::fs::read(aside).unwrap() == b"#V2\n\xff\xfe\n");
    // A folder that cannot be made is no reason not to talk.
    std::fs::remove_dir_all(place.path("data-home")).unwrap();
    std::fs::write(place.path("data-home"), "a file").unwrap();
    let mut unkept = Terminal::open(&place, (24, 80), short).unwrap();
    unkept.shows("not kept for the next time");
    unkept.say("你好");
    unkept.send(UP);
    unkept.line("> 你好");
}

#[test]
fn ctrl_c_stops_the_answer_and_not_the_program() {
    let Some(place) = Workplace::new() else { return };
    let Some(mut terminal) = Terminal::open(&place, (30, 100), "--seed 3 --no-history") else {
        return;
    };
    // Nearly uniform: an answer without end.
    terminal.say("/params temperature=90 top_k=0 top_p=1 max_new_tokens=1900");
    terminal.shows("temperature=90.0");
    let stopped = |screen: &vt100::Screen| screen.contents().contains("(stopped)");
    for _ in 0..10 {
        terminal.say("/clear");
        terminal.send("说下去");
        terminal.line("> 说下去");
        terminal.send("\r");
        // What stands behind the question, or has moved it off the screen.
        terminal.wait("an answer", |screen| {
            let contents = screen.contents();
            let answer = contents
                .rsplit_once("> 说下去")
                .map_or(&*contents, |(_, answer)| answer);
            !answer.trim().is_empty()
        });
        terminal.send(CTRL_C);
        terminal.wait("the end of the answer", |screen| {
            stopped(screen) || at_prompt(screen)
        });
        if stopped(terminal.screen.lock().unwrap().screen()) {
            break;
        }
        eprintln!("the answer ended before Ctrl-C came");
    }
    terminal.shows("(stopped)");
    terminal.prompt();
    terminal.say("/stats");
    terminal.shows("1 questions and answers");
    // In a line: the line is dropped. At an empty prompt: how to leave; twice: leaves.
    terminal.send("不要了");
    terminal.line("> 不要了");
    terminal.send(CTRL_C);
    terminal.prompt();
    terminal.send(CTRL_C);
    terminal.shows("once more or Ctrl-D");
    terminal.prompt();
    terminal.send(CTRL_C);
    assert_eq!(terminal.ended(), Some(0));
}

#[test]
fn commands_and_paths_are_completed_and_mistakes_are_named() {
    let Some(place) = Workplace::new() else { return };
    std::fs::create_dir(place.path("适配器")).unwrap();
    let Some(mut terminal) = Terminal::open(&place, (30, 200), "--max-new-tokens 3 --no-history") else {
        return;
    };
    terminal.send("/par\t");
    terminal.shows("> /params ");
    terminal.send("temp\t");
    terminal.shows("> /params temperature=");
    terminal.say("0.5");
    terminal.shows("temperature=0.5");
    let begun = place.path("适");
    terminal.send(&format!("/adapter {}\t", begun.display()));
    terminal.shows("适配器/");
    terminal.say("");
    terminal.shows("适配器");
    terminal.say("/claer");
    terminal.shows("perhaps /clear");
    terminal.say("你好");
    terminal.say("/undo");
    terminal.shows("taken back: 你好");
    terminal.say("/retry");
    terminal.shows("found no question");
    terminal.say("/help");
    terminal.shows("/system");
    terminal.send("/exit\r");
    assert_eq!(terminal.ended(), Some(0));
}

/// `glmtune chat` with these lines in its pipe.
fn pipe(place: &Workplace, lines: &str, extra: &[&str]) -> std::process::Output {
    let model = place.model();
    let args = [&["chat", "--model", str(&model), "--device", "cpu"], extra].concat();
    let mut child = glmtune(&args)
        .env("XDG_DATA_HOME", place.path("data-home"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// What ends any program of a pipe ends this one.
#[cfg(unix)]
#[test]
fn a_pipe_ends_by_signals_as_any_does() {
    use std::io::BufRead;
    use std::os::unix::process::ExitStatusExt;
    let Some(place) = Workplace::new() else { return };
    let model = place.model();
    for (name, number) in [("INT", 2), ("TERM", 15)] {
        let args = "chat --device cpu --max-new-tokens 2 --model".split(' ');
        let args: Vec<&str> = args.chain([str(&model)]).collect();
        let mut child = glmtune(&args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all("数到3\n".as_bytes()).unwrap();
        let mut answer = String::new();
        let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut answer).unwrap();
        program::signal(&child, name);
        assert_eq!(child.wait().unwrap().signal(), Some(number), "after {answer}");
    }
}

#[test]
fn a_pipe_takes_questions_and_commands_and_gives_answers_alone() {
    let Some(place) = Workplace::new() else { return };
    let file = |name: &str| -> PathBuf { place.path(name) };
    let (first, second) = (file("first.jsonl"), file("second.jsonl"));
    let greedy = ["--greedy", "--max-new-tokens", "6"];
    let lines = format!(
        "/system 请重复\n数到3\n数到4\n/save {first}\n/load {first}\n/undo\n数到4\n/save {second}\n",
        first = first.display(),
        second = second.display()
    );
    let output = pipe(&place, &lines, &greedy);
    succeeds(&output);
    let saved = rows(&first);
    assert_eq!(saved[0]["prompt"], "请重复\n数到3");
    assert_eq!(
        saved[1]["history"],
        json!([["请重复\n数到3", saved[0]["response"]]])
    );
    assert_eq!(
        rows(&second),
        saved,
        "a loaded conversation goes on as the one that was saved"
    );
    let answers = [
        &saved[0]["response"],
        &saved[1]["response"],
        &saved[1]["response"],
    ];
    let answers: String = answers.map(|a| a.as_str().unwrap().to_string() + "\n").concat();
    assert_eq!(text(&output.stdout), answers);
    assert!(!place.path("data-home").exists(), "a pipe keeps no history");

    // What was saved is data to train on, and `generate` gives the same answer to it.
    let answered = file("answered.jsonl");
    let model = place.model();
    let generate = [
        "generate",
        "--model",
        str(&model),
        "--device",
        "cpu",
        "--input",
        str(&first),
        "--output",
        str(&answered),
    ];
    succeeds(&glmtune(&[&generate[..], &greedy].concat()).output().unwrap());
    for (row, saved) in rows(&answered).iter().zip(&saved) {
        let plain = |text: &Value| text.as_str().unwrap().replace('，', ",");
        assert_eq!(plain(&row["predict"]), plain(&saved["response"]));
    }
    let (tiny, run) = (place.model(), place.path("run"));
    let train = [
        "train",
        "--model",
        str(&tiny),
        "--data",
        str(&first),
        "--output",
        str(&run),
        "--max-steps",
        "1",
    ];
    succeeds(&glmtune(&train).output().unwrap());

    // A command that fails ends a pipe: what follows was meant for another state.
    let output = pipe(&place, "/adapter nowhere\n数到3\n", &greedy);
    let line = fails(&output, 1);
    assert!(line.contains("nowhere") && output.stdout.is_empty(), "{line}");
    let line = fails(
        &pipe(&place, &format!("数到3\n/save {}\n", first.display()), &greedy),
        1,
    );
    assert!(
        line.contains("a file that exists") && line.contains("/save! "),
        "{line}"
    );
    let line = fails(&pipe(&place, "/load data.json\n", &greedy), 1);
    assert!(line.contains("data.json: cannot open"), "{line}");
}

#[test]
fn adapters_come_and_go_over_one_base() {
    let Some(place) = Workplace::new() else { return };
    succeeds(&place.train("lora", &["--method", "lora"]).output().unwrap());
    succeeds(
        &place
            .train("qlora", &["--method", "qlora", "--max-steps", "2"])
            .output()
            .unwrap(),
    );
    let (lora, qlora) = (place.path("lora"), place.path("qlora"));
    let greedy = ["--greedy", "--max-new-tokens", "12"];
    let answers = |output: &std::process::Output| -> Vec<String> {
        succeeds(output);
        text(&output.stdout).lines().map(str::to_string).collect()
    };
    let one = |extra: &[&str]| answers(&pipe(&place, "数到7\n", &[&greedy, extra].concat()));
    let base = one(&[]);
    let tuned = one(&["--adapter", str(&lora)]);
    let half = one(&["--adapter", str(&lora), "--adapter-scale", "0.5"]);
    assert_ne!(base, tuned, "the test can tell them apart");
    let ask = "/clear\n数到7\n";
    let lora = lora.display();
    let lines = format!(
        "{ask}/adapter {lora}\n{ask}/adapter {lora} 0.5\n{ask}/adapter\n/adapter off\n{ask}/adapter {lora}\n{ask}"
    );
    let output = pipe(&place, &lines, &greedy);
    let swapped = answers(&output);
    assert_eq!(swapped, [base.clone(), tuned.clone(), half, base, tuned].concat());
    let said = text(&output.stderr);
    assert!(
        said.contains("strength 0.5") && said.contains("no adapter"),
        "{said}"
    );
    assert!(
        !said.contains("which is held"),
        "it is held as it was trained: {said}"
    );
    // Another way to hold the base is said.
    let output = pipe(&place, &format!("/adapter {}\n", qlora.display()), &greedy);
    let said = succeeds(&output);
    assert!(
        said.contains("in 4 bits (nf4)") && said.contains("held as stored here"),
        "{said}"
    );
}

fn special(model: &Model) -> Special {
    let config = model.config();
    Special {
        unk: 0,
        sop: config.bos_token_id,
        eop: config.eos_token_id,
        pad: config.pad_token_id,
        mask: config.mask_token_id,
        gmask: config.gmask_token_id,
    }
}

fn logits(model: &Model) -> Vec<f64> {
    let config = model.config();
    let ids = vec![vec![11, 12, 13, config.gmask_token_id, config.bos_token_id]];
    let batch: Batch = collate::left_pad(&ids, &special(model));
    let mut cache = model.cache(1, batch.len).unwrap();
    values(&model.prefill(&mut cache, &batch).unwrap())
}

/// Modules that trained whole, a head parted from its embedding, a prefix: off again, the base has its bits; on again, they have theirs.
#[test]
fn an_exchange_gives_both_halves_back_to_the_bit() {
    for base in ["checkpoint_fp16_bin", "checkpoint_untied_fp16_safetensors"] {
        let Some(folder) = golden(&format!("chatglm_v1/{base}")) else {
            return;
        };
        let load = || Model::load(&Checkpoint::open(&folder).unwrap(), &LoadOptions::default()).unwrap();
        let modules = vec![SavedModule::LmHead, SavedModule::InputLayernorm];
        let lora = Tuning::Lora(LoraConfig {
            modules_to_save: modules,
            dora: true,
            ..LoraConfig::default()
        });
        let prefix = Tuning::PTuning(PrefixConfig {
            pre_seq_len: 4,
            ..PrefixConfig::default()
        });
        let dir = tempfile::tempdir().unwrap();
        let mut worn = load();
        let bare = logits(&worn);
        for (name, tuning) in [("lora", lora), ("prefix", prefix)] {
            let place = dir.path().join(name);
            let mut trained = load();
            tune::apply(&mut trained, &tuning, 3).unwrap();
            trained
                .for_each_param_mut(&mut |_, param| {
                    if param.trains() {
                        let moved: Vec<f32> = values(&param.value)
                            .iter()
                            .map(|v| *v as f32 * 1.25 + 0.01)
                            .collect();
                        param.value.write(&moved)?;
                    }
                    Ok(())
                })
                .unwrap();
            tune::save(&trained, &tuning, &folder, &place).unwrap();
            let mut alone = load();
            tune::load_adapter(&mut alone, &place, false).unwrap();
            let with = logits(&alone);
            assert_ne!(with, bare, "{name}");

            let (_, mut other) = Exchange::load(&mut worn, &place).unwrap();
            assert_eq!(logits(&worn), with, "{name} on {base}");
            other.exchange(&mut worn);
            assert_eq!(logits(&worn), bare, "{name} off {base}");
            other.exchange(&mut worn);
            assert_eq!(logits(&worn), with, "{name} on {base} again");
            other.exchange(&mut worn);
        }
        // A folder that does not fit leaves nothing behind.
        let place = dir.path().join("lora");
        let weights = place.join("adapter_model.safetensors");
        let config = place.join("adapter_config.json");
        let text = std::fs::read_to_string(&config).unwrap();
        std::fs::write(&config, text.replace("\"dense_4h_to_h\"", "\"dense_h_to_4h\"")).unwrap();
        assert!(weights.exists() && Exchange::load(&mut worn, &place).is_err());
        assert_eq!(logits(&worn), bare);
    }
}
