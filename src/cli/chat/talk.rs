//! The conversation itself: turns in, answers out, commands in between.

use std::collections::BTreeSet;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;

use serde_json::Value;

use super::command::{self, COMMANDS, Command};
use super::conversation::Conversation;
use super::editor::{Input, Line, expand};
use crate::checkpoint::atomic;
use crate::cli::generation::fit;
use crate::error::{Error, Result};
use crate::generate::speed::Speed;
use crate::generate::stream::TextStream;
use crate::generate::{GenerationConfig, OnToken};

/// Who answers.
pub trait Speaker {
    /// A prompt as ids, with `[gMASK] <sop>`.
    fn encode(&self, text: &str) -> Vec<u32>;
    /// An answer as it is shown.
    fn render(&self, ids: &[u32]) -> String;
    /// Answers prompt ids; the number of the answer chooses its random numbers.
    ///
    /// # Errors
    /// Logits that are not finite, no memory.
    fn answer(
        &self,
        ids: &[u32],
        number: u64,
        config: &GenerationConfig,
        on_token: &mut OnToken<'_>,
    ) -> Result<Answered>;
    /// What `/adapter` with this behind it does; the words to say.
    ///
    /// # Errors
    /// The folder holds no adapter of this model, which goes on as before.
    fn adapter(&mut self, what: &str) -> Result<String>;
    /// Bytes of weights that a step reads.
    fn bytes(&self) -> usize;
}

/// How an answer went.
#[derive(Debug, Clone, Copy, Default)]
pub struct Answered {
    /// Tokens and times.
    pub speed: Speed,
    /// Did Ctrl-C end it?
    pub stopped: bool,
}

/// A conversation under way.
pub struct Talk<'a> {
    speaker: &'a mut dyn Speaker,
    /// Answers, and nothing else.
    output: &'a mut dyn Write,
    config: GenerationConfig,
    conversation: Conversation,
    /// Answers so far, taken back or not.
    number: u64,
    last: Option<Speed>,
    speed: Speed,
    /// Files that `/save` may replace: its own.
    own_files: BTreeSet<PathBuf>,
}

/// Does the conversation go on?
type Next = ControlFlow<()>;

impl<'a> Talk<'a> {
    /// Begins.
    pub fn new(speaker: &'a mut dyn Speaker, output: &'a mut dyn Write, config: GenerationConfig) -> Self {
        Self {
            speaker,
            output,
            config,
            conversation: Conversation::default(),
            number: 0,
            last: None,
            speed: Speed::default(),
            own_files: BTreeSet::new(),
        }
    }

    /// Takes turns until the end. On a terminal what goes wrong is said and the conversation goes on; in a pipe it ends it, since
    /// what follows was meant for another state.
    ///
    /// # Errors
    /// The input cannot be read, the output not written; in a pipe, a question that does not fit, a command that fails.
    pub fn run(&mut self, input: &mut dyn Input) -> Result<()> {
        let mut interrupted = false;
        loop {
            let line = match input.next()? {
                Line::End => return Ok(()),
                Line::Interrupted { empty: true } if interrupted => return Ok(()),
                Line::Interrupted { empty } => {
                    if empty {
                        eprintln!("(Ctrl-C once more or Ctrl-D leaves; /help says what else there is)");
                    }
                    interrupted = empty;
                    continue;
                }
                Line::Text(line) => line,
            };
            interrupted = false;
            // A space before a slash makes it a question.
            match self.turn(line.trim_end(), input.is_terminal()) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return Ok(()),
                Err(Error::Io { path, action, source }) if path.as_os_str() == OUTPUT => {
                    return Err(Error::Io { path, action, source });
                }
                Err(error) if input.is_terminal() => eprintln!("{}", error.to_string().replace('\n', " ")),
                Err(error) => return Err(error),
            }
        }
    }

    fn turn(&mut self, line: &str, terminal: bool) -> Result<Next> {
        match command::parse(line) {
            Ok(Some(command)) => return self.obey(command),
            Ok(None) => {}
            // What looks like an unknown command has always been a question in a pipe.
            Err(_) if !terminal && !is_known(line) => {}
            Err(error) => return Err(error),
        }
        match line.trim() {
            "" => {}
            question => self.ask(question)?,
        }
        Ok(ControlFlow::Continue(()))
    }

    fn obey(&mut self, command: Command) -> Result<Next> {
        match command {
            Command::Help => eprintln!("{}", command::help()),
            Command::Exit => return Ok(ControlFlow::Break(())),
            Command::Clear => {
                self.conversation.turns.clear();
                eprintln!("(the conversation is forgotten)");
            }
            Command::Retry => {
                let turn = self.take_back()?;
                if let Err(error) = self.ask(&turn.0) {
                    self.conversation.turns.push(turn);
                    return Err(error);
                }
            }
            Command::Undo => {
                let (question, _) = self.take_back()?;
                eprintln!("(taken back: {question})");
            }
            Command::Stats => self.stats(),
            Command::System(text) => self.system(&text),
            Command::Params(changes) => {
                self.config = command::set(&self.config, &changes)?;
                eprintln!("{}", words(&self.config));
            }
            Command::Adapter(what) => {
                let said = self.speaker.adapter(&what)?;
                eprintln!("{said}");
            }
            Command::Save { file, replace } => self.save(&file, replace)?,
            Command::Load(file) => {
                let path = expand(&file);
                self.conversation = Conversation::read(&path)?;
                let turns = self.conversation.turns.len();
                eprintln!("({turns} questions and answers from {})", path.display());
                self.own_files.insert(path);
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Removes the last turn and returns it.
    fn take_back(&mut self) -> Result<(String, String)> {
        let turn = self.conversation.turns.pop();
        turn.ok_or_else(|| Error::input("conversation", "no question", "at least one", "ask first"))
    }

    fn system(&mut self, text: &str) {
        let system = &mut self.conversation.system;
        match text {
            "" => {}
            "off" => system.clear(),
            text => *system = text.to_string(),
        }
        match system.as_str() {
            "" => eprintln!("(nothing stands before the first question)"),
            text => eprintln!("(before the first question, since ChatGLM-6B knows no system role: {text})"),
        }
    }

    fn save(&mut self, file: &str, replace: bool) -> Result<()> {
        let path = expand(file);
        if self.conversation.turns.is_empty() {
            return Err(Error::input(
                "conversation",
                "no answer",
                "something to save",
                "ask first",
            ));
        }
        if path.exists() && !replace && !self.own_files.contains(&path) {
            let remedy = format!("name another, or replace it with /save! {file}");
            return Err(Error::input(
                path.display(),
                "a file that exists",
                "a new one",
                remedy,
            ));
        }
        atomic::write(&path, self.conversation.to_jsonl().as_bytes())?;
        let turns = self.conversation.turns.len();
        eprintln!("({turns} questions and answers: {})", path.display());
        self.own_files.insert(path);
        Ok(())
    }

    fn stats(&self) {
        let bytes = self.speaker.bytes();
        let turns = self.conversation.turns.len();
        eprintln!(
            "conversation: {turns} questions and answers; answers so far: {}",
            self.number
        );
        match self.last {
            None => eprintln!("no answer yet"),
            Some(last) => eprintln!("last: {}\nall: {}", last.report(bytes), self.speed),
        }
    }

    /// Answers a question, piece by piece, and remembers both.
    fn ask(&mut self, question: &str) -> Result<()> {
        let Conversation { system, turns } = &self.conversation;
        let speaker = &*self.speaker;
        let encode = |text: &str| speaker.encode(text);
        let (ids, dropped) = fit(&encode, system, question, turns, &self.config)?;
        if dropped > 0 {
            self.conversation.turns.drain(..dropped);
            eprintln!("(no room: the {dropped} oldest turns are forgotten)");
        }
        let speaker = &*self.speaker;
        let output = &mut *self.output;
        let mut stream = TextStream::new(|ids: &[u32]| speaker.render(ids));
        let mut failure = None;
        let mut show = |piece: String| match write!(output, "{piece}").and_then(|()| output.flush()) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        };
        let answered = speaker.answer(&ids, self.number, &self.config, &mut |_, id| {
            show(stream.push(id))
        })?;
        let response = stream.text();
        let _ = show(stream.finish() + "\n");
        if let Some(error) = failure {
            return Err(Error::io(OUTPUT, "write to")(error));
        }
        if answered.stopped {
            eprintln!("(stopped)");
        }
        self.number += 1;
        self.last = Some(answered.speed);
        self.speed.add(&answered.speed);
        self.conversation.turns.push((question.to_string(), response));
        Ok(())
    }
}

/// The place in errors about the output.
const OUTPUT: &str = "standard output";

/// Does the first word name a command, whatever is wrong behind it?
fn is_known(line: &str) -> bool {
    let first = line.split_whitespace().next();
    COMMANDS.iter().any(|(name, ..)| Some(*name) == first)
}

/// The settings as `/params` takes them.
fn words(config: &GenerationConfig) -> String {
    let value = |value: Value| match value {
        Value::Null => "none".to_string(),
        value => value.to_string(),
    };
    let pairs = config.named().map(|(name, v)| format!("{name}={}", value(v)));
    pairs.join(" ")
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::super::editor::Pipe;
    use super::*;
    use crate::data::template;

    /// Answers with `answers` in turn, a byte a token, and remembers what it was asked.
    struct Fake<'a> {
        answers: &'a [&'a str],
        asked: RefCell<Vec<String>>,
        adapter: String,
    }

    impl Speaker for Fake<'_> {
        fn encode(&self, text: &str) -> Vec<u32> {
            text.bytes().map(u32::from).collect()
        }

        fn render(&self, ids: &[u32]) -> String {
            let bytes: Vec<u8> = ids.iter().map(|&id| id as u8).collect();
            String::from_utf8_lossy(&bytes).trim().to_string()
        }

        fn answer(
            &self,
            ids: &[u32],
            number: u64,
            _: &GenerationConfig,
            on_token: &mut OnToken<'_>,
        ) -> Result<Answered> {
            let bytes = ids.iter().map(|&id| id as u8).collect();
            self.asked.borrow_mut().push(String::from_utf8(bytes).unwrap());
            for byte in self.answers[number as usize].bytes() {
                if on_token(0, u32::from(byte)).is_break() {
                    break;
                }
            }
            Ok(Answered::default())
        }

        fn adapter(&mut self, what: &str) -> Result<String> {
            if what == "nowhere" {
                return Err(Error::input(what, "nothing", "an adapter", "give another"));
            }
            self.adapter = what.to_string();
            Ok(what.to_string())
        }

        fn bytes(&self) -> usize {
            0
        }
    }

    /// Lines as a person types them.
    struct Typed<'a>(std::iter::Copied<std::slice::Iter<'a, &'a str>>);

    impl Input for Typed<'_> {
        fn next(&mut self) -> Result<Line> {
            Ok(match self.0.next() {
                Some("^C") => Line::Interrupted { empty: true },
                Some("x^C") => Line::Interrupted { empty: false },
                Some(line) => Line::Text(line.to_string()),
                None => Line::End,
            })
        }

        fn is_terminal(&self) -> bool {
            true
        }
    }

    /// What came of it, what was written, what was asked.
    type Held = (Result<()>, String, Vec<String>, String);

    fn hold(input: &mut dyn Input, max_length: usize, answers: &[&str]) -> Held {
        let mut fake = Fake {
            answers,
            asked: RefCell::default(),
            adapter: String::new(),
        };
        let config = GenerationConfig {
            max_length,
            ..GenerationConfig::default()
        };
        let mut output = Vec::new();
        let result = Talk::new(&mut fake, &mut output, config).run(input);
        let asked = fake.asked.into_inner();
        (result, String::from_utf8(output).unwrap(), asked, fake.adapter)
    }

    fn piped(input: &[u8], max_length: usize, answers: &[&str]) -> Held {
        hold(&mut Pipe::new(input), max_length, answers)
    }

    fn typed(lines: &[&str], answers: &[&str]) -> Held {
        hold(&mut Typed(lines.iter().copied()), 2000, answers)
    }

    fn pair(question: &str, answer: &str) -> (String, String) {
        (question.to_string(), answer.to_string())
    }

    #[test]
    fn a_pipe_yields_the_answers_and_the_history_grows() {
        let input = "你好\n\nb\n/clear\nc\n/etc\n".as_bytes();
        let (result, output, asked, _) = piped(input, 500, &[" 好👋", "B.", "C", "D"]);
        result.unwrap();
        assert_eq!(output, "好👋\nB.\nC\nD\n");
        assert_eq!(asked[0], template::prompt("你好", &[]));
        assert_eq!(asked[1], template::prompt("b", &[pair("你好", "好👋")]));
        assert_eq!(asked[2], template::prompt("c", &[]));
        assert_eq!(asked[3], template::prompt("/etc", &[pair("c", "C")]));
    }

    #[test]
    fn the_oldest_turns_make_room_and_the_system_stays() {
        let (result, _, asked, _) = piped(b"aaaaaaaaaaaaaaaaaaaa\nb\nc", 120, &["A", "B", "C"]);
        result.unwrap();
        assert!(asked[1].contains("aaaa"));
        assert_eq!(asked[2], template::prompt("c", &[pair("b", "B")]));
        let (result, ..) = piped(&[b'x'; 200], 120, &[]);
        assert!(result.unwrap_err().to_string().contains("--max-length 120"));

        let input = b"/system S\naaaaaaaaaaaaaaaaaaaa\nb\nc\n/system off\n/clear\nd";
        let (result, _, asked, _) = piped(input, 128, &["A", "B", "C", "D"]);
        result.unwrap();
        assert_eq!(asked[0], "S\naaaaaaaaaaaaaaaaaaaa");
        assert_eq!(asked[2], template::prompt("c", &[pair("S\nb", "B")]));
        assert_eq!(asked[3], "d");
    }

    #[test]
    fn what_fails_ends_a_pipe_and_not_a_person() {
        let (result, output, ..) = piped(b"a\n/adapter nowhere\nb\n", 500, &["A", "B"]);
        assert!(
            result
                .unwrap_err()
                .to_string()
                .starts_with("nowhere: found nothing")
        );
        assert_eq!(output, "A\n");
        let lines = [
            "/adapter nowhere",
            "/claer",
            "/undo",
            "/load no.jsonl",
            "a",
            "/params top_p=7",
            "b",
        ];
        let (result, output, ..) = typed(&lines, &["A", "B"]);
        result.unwrap();
        assert_eq!(output, "A\nB\n");
        let (result, ..) = piped(b"\n\xff\n", 100, &[]);
        let line = result.unwrap_err().to_string();
        assert!(line.starts_with("standard input:2: found byte 0xff"), "{line}");
    }

    #[test]
    fn turns_are_taken_back_and_asked_again() {
        let lines = ["a", "b", "/retry", "/undo", "c", "/adapter x 0.5", "/exit", "d"];
        let (result, output, asked, adapter) = typed(&lines, &["A", "B", "B2", "C"]);
        result.unwrap();
        assert_eq!(output, "A\nB\nB2\nC\n");
        assert_eq!(asked[1], asked[2], "the same prompt, another number");
        assert_eq!(asked[3], template::prompt("c", &[pair("a", "A")]));
        assert_eq!(adapter, "x 0.5");
    }

    #[test]
    fn a_question_that_cannot_be_asked_again_keeps_its_answer() {
        let long = "a".repeat(40);
        let lines = [
            &long,
            "/params max_length=20",
            "/retry",
            "/params max_length=2000",
            "b",
        ];
        let (result, output, asked, _) = typed(&lines, &["A", "B"]);
        result.unwrap();
        assert_eq!(output, "A\nB\n");
        assert_eq!(asked[1], template::prompt("b", &[pair(&long, "A")]));
    }

    #[test]
    fn two_interrupts_at_an_empty_prompt_leave() {
        for (lines, said) in [
            (&["^C", "^C", "a"][..], ""),
            (&["^C", "x^C", "^C", "a", "^C"], "A\n"),
            (&["^C", "a", "^C", "^C", "b"], "A\n"),
        ] {
            let (result, output, ..) = typed(lines, &["A", "B"]);
            result.unwrap();
            assert_eq!(output, said, "{lines:?}");
        }
    }

    #[test]
    fn a_conversation_is_saved_where_nothing_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("talk.jsonl");
        let save = format!("/save {}", path.display());
        let load = format!("/load {}", path.display());
        let (result, ..) = typed(&["a", &save, "b", &save], &["A", "B"]);
        result.unwrap();
        let saved = std::fs::read_to_string(&path).unwrap();
        assert_eq!(saved.lines().count(), 2, "its own file may be replaced");
        // Another session may not, unless it says so.
        let (result, ..) = piped(format!("c\n{save}\n").as_bytes(), 500, &["C"]);
        assert!(result.unwrap_err().to_string().contains("/save! "));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), saved);
        let (result, _, asked, _) = typed(&[&load, "d"], &["D"]);
        result.unwrap();
        assert_eq!(asked[0], template::prompt("d", &[pair("a", "A"), pair("b", "B")]));
    }
}
