//! What may be typed instead of a question.

use crate::error::{Error, Result};
use crate::generate::GenerationConfig;

/// A command with what follows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// `/help`
    Help,
    /// `/exit`
    Exit,
    /// `/clear`
    Clear,
    /// `/retry`
    Retry,
    /// `/undo`
    Undo,
    /// `/stats`
    Stats,
    /// `/system [TEXT]`
    System(String),
    /// `/params [key=value ...]`
    Params(String),
    /// `/adapter [DIR [factor] | off]`
    Adapter(String),
    /// `/save FILE`; `/save! FILE` replaces it.
    Save {
        /// The file.
        file: String,
        /// May it be replaced?
        replace: bool,
    },
    /// `/load FILE`
    Load(String),
}

/// Every command: its name, what follows it, what it does.
pub const COMMANDS: [(&str, &str, &str); 12] = [
    ("/help", "", "this list"),
    ("/clear", "", "forget the conversation"),
    (
        "/retry",
        "",
        "answer the last question again, with other random numbers",
    ),
    ("/undo", "", "take the last question and its answer back"),
    (
        "/system",
        "[TEXT]",
        "text before the first question; `off` removes it, without TEXT it is shown",
    ),
    (
        "/adapter",
        "[DIR [FACTOR]]",
        "use another adapter, at this strength; `off` uses the base alone",
    ),
    (
        "/params",
        "[KEY=VALUE ...]",
        "show or change how tokens are chosen",
    ),
    (
        "/save",
        "FILE",
        "write the conversation as JSONL that `glmtune train` reads",
    ),
    ("/save!", "FILE", "the same, and replace the file"),
    ("/load", "FILE", "go on with a conversation that /save wrote"),
    ("/stats", "", "tokens and speed so far"),
    ("/exit", "", "leave (also Ctrl-D)"),
];

/// What `/help` says.
pub fn help() -> String {
    let mut text = String::new();
    for (name, arguments, what) in COMMANDS {
        text += &format!("{:<24} {what}\n", format!("{name} {arguments}"));
    }
    text + "A line that ends in \\ goes on in the next one; text may be pasted with its line breaks.\n\
            Ctrl-C stops the answer; at an empty prompt, twice, it leaves. Tab completes commands and paths."
}

/// The command of a line; `None` if it is a question, as is everything whose first word is not `/` and letters.
///
/// # Errors
/// No command has this name: the nearest is named. A command lacks its argument.
pub fn parse(line: &str) -> Result<Option<Command>> {
    let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let rest = rest.trim().to_string();
    let letters = name.strip_prefix('/').map(|n| n.strip_suffix('!').unwrap_or(n));
    if !letters.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_alphabetic())) {
        return Ok(None);
    }
    let file = |what: &str| match rest.as_str() {
        "" => Err(Error::input(
            name,
            "nothing behind it",
            what,
            format!("write {name} FILE"),
        )),
        rest => Ok(rest.to_string()),
    };
    Ok(Some(match name {
        "/help" => Command::Help,
        "/exit" => Command::Exit,
        "/clear" => Command::Clear,
        "/retry" => Command::Retry,
        "/undo" => Command::Undo,
        "/stats" => Command::Stats,
        "/system" => Command::System(rest),
        "/params" => Command::Params(rest),
        "/adapter" => Command::Adapter(rest),
        "/save" | "/save!" => Command::Save {
            file: file("a file to write")?,
            replace: name == "/save!",
        },
        "/load" => Command::Load(file("a file to read")?),
        _ => {
            let names = COMMANDS.map(|(name, ..)| name);
            let nearest = nearest(name, &names).unwrap_or("/help");
            let remedy = "/help lists all; a question may begin with a space";
            return Err(Error::input(
                name,
                "no such command",
                format!("perhaps {nearest}"),
                remedy,
            ));
        }
    }))
}

/// The name that fewest changes of letters away from `word` give.
fn nearest<'n>(word: &str, names: &[&'n str]) -> Option<&'n str> {
    names.iter().copied().min_by_key(|name| distance(word, name))
}

/// Levenshtein's distance: letters inserted, removed or replaced.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// The names of [`set`].
pub const PARAMS: [&str; 9] = [
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "max_new_tokens",
    "max_length",
    "seed",
];

/// `config` with the changes of `text`: `key=value`, separated by white space.
///
/// # Errors
/// An unknown key (the nearest is named), a value that it cannot have.
pub fn set(config: &GenerationConfig, text: &str) -> Result<GenerationConfig> {
    let mut config = config.clone();
    for change in text.split_whitespace() {
        let Some((key, value)) = change.split_once('=') else {
            let remedy = "write /params temperature=0.7 top_p=0.9";
            return Err(Error::input("/params", change, "key=value", remedy));
        };
        let key = key.trim_start_matches('-').replace('-', "_");
        let place = format!("/params {key}");
        match key.as_str() {
            "do_sample" => config.do_sample = value_of(&place, value, "true or false")?,
            "greedy" => config.do_sample = !value_of::<bool>(&place, value, "true or false")?,
            "temperature" => config.temperature = value_of(&place, value, "a number")?,
            "top_k" => config.top_k = value_of(&place, value, "a whole number")?,
            "top_p" => config.top_p = value_of(&place, value, "a number")?,
            "repetition_penalty" => config.repetition_penalty = value_of(&place, value, "a number")?,
            "no_repeat_ngram_size" => {
                config.no_repeat_ngram_size = value_of(&place, value, "a whole number")?;
            }
            "max_new_tokens" if value == "none" => config.max_new_tokens = None,
            "max_new_tokens" => {
                config.max_new_tokens = Some(value_of(&place, value, "a whole number or none")?);
            }
            "max_length" => config.max_length = value_of(&place, value, "a whole number")?,
            "seed" => config.seed = value_of(&place, value, "a whole number")?,
            _ => {
                let nearest = nearest(&key, &PARAMS).unwrap_or_default();
                let remedy = "/params alone shows them all";
                return Err(Error::input(
                    place,
                    "no such key",
                    format!("perhaps {nearest}"),
                    remedy,
                ));
            }
        }
    }
    config.validate()?;
    Ok(config)
}

fn value_of<T: std::str::FromStr>(place: &str, value: &str, expected: &str) -> Result<T> {
    let remedy = "/params alone shows the values in use";
    value
        .parse()
        .map_err(|_| Error::input(place, value, expected, remedy))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_and_commands_are_told_apart() {
        for question in ["", "你好", "/", "/etc/fstab 是什么", "/1+1", "a /help", "//help"] {
            assert_eq!(parse(question).unwrap(), None, "{question}");
        }
        assert_eq!(
            parse("/system  你是医生 ").unwrap(),
            Some(Command::System("你是医生".into()))
        );
        let save = |file: &str, replace| Command::Save {
            file: file.into(),
            replace,
        };
        assert_eq!(parse("/save a b.jsonl").unwrap(), Some(save("a b.jsonl", false)));
        assert_eq!(parse("/save! c").unwrap(), Some(save("c", true)));
        assert!(parse("/load").unwrap_err().to_string().contains("/load FILE"));
        for (wrong, right) in [
            ("/claer", "/clear"),
            ("/exot", "/exit"),
            ("/param", "/params"),
            ("/saev", "/save"),
        ] {
            let line = parse(wrong).unwrap_err().to_string();
            assert!(line.contains(&format!("perhaps {right};")), "{line}");
        }
        for (name, ..) in COMMANDS {
            assert!(parse(&format!("{name} x")).unwrap().is_some(), "{name}");
        }
    }

    #[test]
    fn sampling_changes_by_name_and_stays_valid() {
        let config = GenerationConfig::default();
        let changed = set(&config, "temperature=0.5  top-k=7 max_new_tokens=9 greedy=true").unwrap();
        let want = GenerationConfig {
            temperature: 0.5,
            top_k: 7,
            max_new_tokens: Some(9),
            do_sample: false,
            ..config.clone()
        };
        assert_eq!(changed, want);
        assert_eq!(set(&changed, "max_new_tokens=none").unwrap().max_new_tokens, None);
        let names = config.named().map(|(name, _)| name);
        assert_eq!(names, PARAMS);
        for (text, says) in [
            ("temprature=1", "perhaps temperature"),
            ("top_k=many", "/params top_k: found many"),
            ("hot", "key=value"),
            ("temperature=0", "expected a number above 0"),
        ] {
            let line = set(&config, text).unwrap_err().to_string();
            assert!(line.contains(says), "{line}");
        }
    }
}
