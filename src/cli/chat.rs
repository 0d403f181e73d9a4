//! `glmtune chat`: a conversation in the terminal, or one line per turn from a pipe.

use std::io::{BufRead, IsTerminal, Write};
use std::ops::ControlFlow;
use std::process::exit;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;

use crate::data::{collate, template};
use crate::error::{Error, Result};
use crate::generate::stream::TextStream;
use crate::generate::{GenerationConfig, OnToken, generate};

use super::generation::{ModelArgs, SamplingArgs, fit, load};

/// Talk to a model, with or without an adapter
#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

const HELP: &str = "/clear  forget the conversation\n/exit   leave (also Ctrl-D)\n/help   this list\nCtrl-C  stop the answer; leave when there is none";

/// An answer is being generated: Ctrl-C stops it instead of the program.
static ANSWERING: AtomicBool = AtomicBool::new(false);
/// Ctrl-C was pressed during this answer.
static STOP: AtomicBool = AtomicBool::new(false);

/// Runs `glmtune chat`.
///
/// # Errors
/// Files that cannot be used, logits that are not finite, output that cannot be written.
pub fn run(args: ChatArgs) -> Result<()> {
    let config = args.sampling.config()?;
    let (model, tokenizer) = load(&args.model)?;
    ctrlc::set_handler(|| {
        if ANSWERING.load(Ordering::SeqCst) {
            STOP.store(true, Ordering::SeqCst);
        } else {
            eprintln!();
            exit(130);
        }
    })
    .map_err(|e| Error::Usage(format!("cannot listen for Ctrl-C: {e}")))?;

    let input = std::io::stdin();
    let terminal = input.is_terminal();
    if terminal {
        eprintln!("{HELP}");
    }
    let text = Text {
        encode: &|text| tokenizer.build_inputs(&tokenizer.encode(text), None),
        render: &|ids| template::process_response(&tokenizer.decode(ids)),
    };
    let special = tokenizer.special();
    let mut answer = |ids: &[u32], number: u64, on_token: &mut OnToken<'_>| {
        STOP.store(false, Ordering::SeqCst);
        ANSWERING.store(true, Ordering::SeqCst);
        let batch = collate::left_pad(&[ids.to_vec()], &special);
        let result = generate(&model, &batch, &[number], &config, &mut |row, id| {
            if STOP.load(Ordering::SeqCst) {
                ControlFlow::Break(())
            } else {
                on_token(row, id)
            }
        });
        ANSWERING.store(false, Ordering::SeqCst);
        result.map(drop)
    };
    talk(
        &mut input.lock(),
        &mut std::io::stdout().lock(),
        terminal,
        &text,
        &config,
        &mut answer,
    )
}

/// Text to ids and back.
struct Text<'a> {
    /// A prompt as ids, with `[gMASK] <sop>`.
    encode: &'a dyn Fn(&str) -> Vec<u32>,
    /// An answer as it is shown.
    render: &'a dyn Fn(&[u32]) -> String,
}

/// Answers prompt ids; the number of the answer chooses its random numbers.
type Answer<'a> = dyn FnMut(&[u32], u64, &mut OnToken<'_>) -> Result<()> + 'a;

/// The conversation: lines in, answers out. Prompt marks appear only on a terminal, so a pipe yields the answers alone.
fn talk(
    input: &mut dyn BufRead,
    output: &mut dyn Write,
    terminal: bool,
    text: &Text<'_>,
    config: &GenerationConfig,
    answer: &mut Answer<'_>,
) -> Result<()> {
    let written = || Error::io("standard output", "write to");
    let mut history: Vec<(String, String)> = Vec::new();
    let mut answers = 0;
    for number in 1.. {
        if terminal {
            write!(output, "\n> ")
                .and_then(|()| output.flush())
                .map_err(written())?;
        }
        let Some(line) = read_line(input, number)? else {
            break;
        };
        let query = line.trim();
        match query {
            "" => continue,
            "/exit" => break,
            "/help" => {
                writeln!(output, "{HELP}").map_err(written())?;
                continue;
            }
            "/clear" => {
                history.clear();
                eprintln!("(the conversation is forgotten)");
                continue;
            }
            _ => {}
        }
        let (ids, dropped) = match fit(text.encode, query, &history, config) {
            Err(error) if terminal => {
                eprintln!("{error}");
                continue;
            }
            fitted => fitted?,
        };
        if dropped > 0 {
            history.drain(..dropped);
            eprintln!("(no room: the {dropped} oldest turns are forgotten)");
        }
        let mut stream = TextStream::new(text.render);
        let mut failure = None;
        let mut show = |piece: String| match write!(output, "{piece}").and_then(|()| output.flush()) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        };
        answer(&ids, answers, &mut |_, id| show(stream.push(id)))?;
        let response = stream.text();
        let _ = show(stream.finish() + "\n");
        if let Some(error) = failure {
            return Err(written()(error));
        }
        answers += 1;
        history.push((query.to_string(), response));
    }
    Ok(())
}

/// The next line, or `None` at the end.
fn read_line(input: &mut dyn BufRead, number: usize) -> Result<Option<String>> {
    let mut line = Vec::new();
    if input
        .read_until(b'\n', &mut line)
        .map_err(Error::io("standard input", "read"))?
        == 0
    {
        return Ok(None);
    }
    String::from_utf8(line).map(Some).map_err(|e| {
        Error::input(
            format!("standard input:{number}"),
            format!("byte {:#04x}", e.as_bytes()[e.utf8_error().valid_up_to()]),
            "UTF-8 text",
            "convert the input to UTF-8",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A conversation with a model that answers with `answers` in turn; returns what it wrote and the prompts it saw.
    fn conversation(
        input: &[u8],
        terminal: bool,
        max_length: usize,
        answers: &[&str],
    ) -> (Result<()>, String, Vec<String>) {
        let text = Text {
            encode: &|text| text.bytes().map(u32::from).collect(),
            render: &|ids| {
                String::from_utf8_lossy(&ids.iter().map(|&id| id as u8).collect::<Vec<_>>())
                    .trim()
                    .to_string()
            },
        };
        let config = GenerationConfig {
            max_length,
            ..GenerationConfig::default()
        };
        let (mut output, mut prompts) = (Vec::new(), Vec::new());
        let mut answer = |ids: &[u32], number: u64, on_token: &mut OnToken<'_>| {
            prompts.push(String::from_utf8(ids.iter().map(|&id| id as u8).collect()).unwrap());
            for byte in answers[number as usize].bytes() {
                if on_token(0, u32::from(byte)).is_break() {
                    break;
                }
            }
            Ok(())
        };
        let result = talk(
            &mut &input[..],
            &mut output,
            terminal,
            &text,
            &config,
            &mut answer,
        );
        (result, String::from_utf8(output).unwrap(), prompts)
    }

    #[test]
    fn a_pipe_yields_the_answers_and_the_history_grows() {
        let (result, output, prompts) = conversation(
            "你好\n\nb\n/clear\nc\n".as_bytes(),
            false,
            500,
            &[" 好👋", "B.", "C"],
        );
        result.unwrap();
        assert_eq!(output, "好👋\nB.\nC\n");
        assert_eq!(prompts[0], template::prompt("你好", &[]));
        assert_eq!(
            prompts[1],
            template::prompt("b", &[("你好".to_string(), "好👋".to_string())])
        );
        assert_eq!(prompts[2], template::prompt("c", &[]));
    }

    #[test]
    fn the_oldest_turns_make_room() {
        let (result, _, prompts) = conversation(b"aaaaaaaaaaaaaaaaaaaa\nb\nc", false, 120, &["A", "B", "C"]);
        result.unwrap();
        assert!(prompts[1].contains("aaaa"));
        assert_eq!(
            prompts[2],
            template::prompt("c", &[("b".to_string(), "B".to_string())])
        );
        let (result, ..) = conversation(&[b'x'; 200], false, 120, &[]);
        assert!(result.unwrap_err().to_string().contains("--max-length 120"));
    }

    #[test]
    fn commands_end_and_explain() {
        let (result, output, prompts) = conversation(b"/help\n/exit\nx\n", true, 100, &[]);
        result.unwrap();
        assert!(output.contains("/clear") && prompts.is_empty());
    }

    #[test]
    fn text_that_is_not_utf8_is_refused_with_its_line() {
        let (result, ..) = conversation(b"\n\xff\n", false, 100, &[]);
        assert!(
            result
                .unwrap_err()
                .to_string()
                .starts_with("standard input:2: found byte 0xff")
        );
    }
}
