//! The official prompt and the official finish of an answer: one template for training, evaluation and chat.

/// The prompt of the official `chat`: the bare `query` without history, else [`rounds`].
pub fn prompt(query: &str, history: &[(String, String)]) -> String {
    if history.is_empty() {
        query.to_string()
    } else {
        rounds(query, history)
    }
}

/// `[Round i]\n问：…\n答：…\n` for every turn, counted from 0, and `query` as the last round with an open answer.
pub fn rounds(query: &str, history: &[(String, String)]) -> String {
    let mut prompt = String::new();
    for (i, (question, answer)) in history.iter().enumerate() {
        prompt += &format!("[Round {i}]\n问：{question}\n答：{answer}\n");
    }
    prompt + &format!("[Round {}]\n问：{query}\n答：", history.len())
}

/// What the official `process_response` makes of a decoded answer: white space at the ends removed, the placeholder of
/// the training date filled in, ASCII punctuation beside a Chinese character made full width.
pub fn process_response(response: &str) -> String {
    let response = response
        .trim_matches(crate::tokenizer::is_python_space)
        .replace("[[训练时间]]", "2023年");
    let mut out = String::with_capacity(response.len() + 8);
    let mut before = None;
    let mut characters = response.chars().peekable();
    while let Some(character) = characters.next() {
        let beside = before.is_some_and(is_chinese) || characters.peek().copied().is_some_and(is_chinese);
        out.push(match character {
            ',' if beside => '，',
            '!' if beside => '！',
            ':' if beside => '：',
            ';' if beside => '；',
            '?' if beside => '？',
            other => other,
        });
        before = Some(character);
    }
    out
}

fn is_chinese(c: char) -> bool {
    ('\u{4e00}'..='\u{9fff}').contains(&c)
}
