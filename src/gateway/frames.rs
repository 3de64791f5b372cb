//! Messages as the bytes of a body.

use std::borrow::Cow;

use axum::http::HeaderMap;
use axum::http::header::ACCEPT;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::problem::document;
use crate::backend::http::wire::{LEN, MAX_MESSAGE, RECORDS, Record};
use crate::error::{Error, Kind, Result};
use crate::message::Message;
use crate::pipe::framing::encode;
use crate::selector::Frame;

/// How messages are written into an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Framed(Frame),
    /// One JSON object a line.
    Json,
    /// Server-sent events (WHATWG HTML, 9.2).
    Events,
    /// What the http backend reads.
    Records,
}

const JSON: &str = "application/x-ndjson";
const EVENTS: &str = "text/event-stream";

impl Format {
    /// What the query's `frame` or the Accept header asks for; else lines.
    ///
    /// # Errors
    /// `InvalidInput`.
    pub(super) fn of_pull(frame: Option<&str>, headers: &HeaderMap) -> Result<Self> {
        if let Some(frame) = frame {
            return match frame {
                "line" => Ok(Format::Framed(Frame::Line)),
                "nul" => Ok(Format::Framed(Frame::Nul)),
                "len" => Ok(Format::Framed(Frame::Len)),
                "json" => Ok(Format::Json),
                _ => Err(unknown(frame, "line nul len json")),
            };
        }
        let accepted = headers.get(ACCEPT).and_then(|value| value.to_str().ok());
        let types = accepted.unwrap_or_default().split(',');
        let known = types.filter_map(|accepted| {
            let bare = accepted.split(';').next().unwrap_or_default().trim();
            match bare.to_ascii_lowercase().as_str() {
                RECORDS => Some(Format::Records),
                EVENTS => Some(Format::Events),
                JSON => Some(Format::Json),
                LEN => Some(Format::Framed(Frame::Len)),
                _ => None,
            }
        });
        Ok(known
            .into_iter()
            .next()
            .unwrap_or(Format::Framed(Frame::Line)))
    }

    pub(super) fn content_type(self) -> &'static str {
        match self {
            Format::Framed(Frame::Line) => "text/plain; charset=utf-8",
            Format::Framed(Frame::Len) => LEN,
            Format::Framed(Frame::Nul | Frame::File) => "application/octet-stream",
            Format::Json => JSON,
            Format::Events => EVENTS,
            Format::Records => RECORDS,
        }
    }

    /// Appends a message.
    pub(super) fn put(self, message: &Message, out: &mut Vec<u8>) {
        match self {
            Format::Framed(frame) => encode(frame, &message.data, 0, usize::MAX, out),
            // No client of ours would take it.
            Format::Records if message.data.len() > MAX_MESSAGE => {
                let (position, bytes) = (message.position, message.data.len());
                let why = format!(
                    "message {position} has {bytes} bytes; a gateway hands on {MAX_MESSAGE}"
                );
                Record::put_failed(&document(&Error::new(Kind::TooLong, why)), out);
            }
            Format::Records => Record::put_message(message, out),
            Format::Json => {
                put_json(message, out);
                out.push(b'\n');
            }
            Format::Events => {
                out.extend_from_slice(format!("id: {}\n", message.position).as_bytes());
                match str::from_utf8(&message.data) {
                    // A carriage return would end the field's line.
                    Ok(text) if !text.contains('\r') => {
                        for line in text.split('\n') {
                            out.extend_from_slice(b"data: ");
                            out.extend_from_slice(line.as_bytes());
                            out.push(b'\n');
                        }
                        out.push(b'\n');
                    }
                    _ => {
                        out.extend_from_slice(b"event: json\ndata: ");
                        put_json(message, out);
                        out.extend_from_slice(b"\n\n");
                    }
                }
            }
        }
    }
}

/// How a push's body holds messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PushFormat {
    Framed(Frame),
    Json,
}

impl PushFormat {
    /// What the query's `frame` or the Content-Type says; else lines.
    ///
    /// # Errors
    /// `InvalidInput`.
    pub(super) fn of_push(frame: Option<&str>, content_type: Option<&[u8]>) -> Result<Self> {
        // Parameters, as a charset, do not make it another type; neither does case.
        let is = |known: &str| {
            let bare = content_type.and_then(|sent| sent.split(|byte| *byte == b';').next());
            bare.is_some_and(|bare| bare.trim_ascii().eq_ignore_ascii_case(known.as_bytes()))
        };
        match frame {
            Some("json") => Ok(PushFormat::Json),
            Some(frame) => frame
                .parse()
                .map(PushFormat::Framed)
                .map_err(|_| unknown(frame, "line nul file len json")),
            None if is(LEN) => Ok(PushFormat::Framed(Frame::Len)),
            None if is(JSON) => Ok(PushFormat::Json),
            None => Ok(PushFormat::Framed(Frame::Line)),
        }
    }

    /// The frame that finds where a message ends.
    pub(super) fn frame(self) -> Frame {
        match self {
            PushFormat::Framed(frame) => frame,
            PushFormat::Json => Frame::Line,
        }
    }

    /// The message that a frame's content stands for.
    ///
    /// # Errors
    /// `InvalidInput` for what is not JSON.
    pub(super) fn message(self, content: Bytes) -> Result<Bytes> {
        match self {
            PushFormat::Framed(_) => Ok(content),
            PushFormat::Json => {
                let bad = |error: String| {
                    Error::new(
                        Kind::InvalidInput,
                        format!("not a message in the json frame: {error}"),
                    )
                };
                // Serde would take an array for the members in their order.
                if !content.trim_ascii_start().starts_with(b"{") {
                    return Err(bad("it is no object".to_owned()));
                }
                let pushed: JsonIn =
                    serde_json::from_slice(&content).map_err(|error| bad(error.to_string()))?;
                match (pushed.data, pushed.data_base64) {
                    (Some(data), None) => Ok(data.into_owned().into()),
                    (None, Some(data)) => Ok(BASE64
                        .decode(data.as_bytes())
                        .map_err(|error| bad(error.to_string()))?
                        .into()),
                    _ => Err(bad("it needs one of data and data_base64".to_owned())),
                }
            }
        }
    }
}

fn unknown(frame: &str, known: &str) -> Error {
    Error::new(
        Kind::InvalidInput,
        format!("frame {frame:?}: there are: {known}"),
    )
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonIn<'a> {
    #[serde(borrow)]
    data: Option<Cow<'a, str>>,
    #[serde(borrow)]
    data_base64: Option<Cow<'a, str>>,
}

#[derive(Serialize)]
struct JsonOut<'a> {
    seq: String,
    time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_base64: Option<String>,
}

fn put_json(message: &Message, out: &mut Vec<u8>) {
    let text = str::from_utf8(&message.data).ok();
    let json = JsonOut {
        seq: message.position.to_string(),
        time: humantime::format_rfc3339_micros(message.time).to_string(),
        data: text,
        data_base64: text.is_none().then(|| BASE64.encode(&message.data)),
    };
    // Strings always become JSON, and a vector takes all that is written to it.
    if let Err(error) = serde_json::to_writer(&mut *out, &json) {
        log::error!("writing JSON: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Position, time_from_micros};

    fn put(format: Format, data: &'static [u8]) -> String {
        let message = Message {
            position: Position::new(1, 5),
            time: time_from_micros(1_700_000_000_000_001),
            data: Bytes::from_static(data),
        };
        let mut out = Vec::new();
        format.put(&message, &mut out);
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn json_holds_text_as_text_and_the_rest_in_base64() {
        assert_eq!(
            put(Format::Json, b"a\"b"),
            "{\"seq\":\"1-5\",\"time\":\"2023-11-14T22:13:20.000001Z\",\"data\":\"a\\\"b\"}\n"
        );
        assert!(put(Format::Json, b"\xff\0").contains("\"data_base64\":\"/wA=\""));
        let message = |text: &'static str| PushFormat::Json.message(Bytes::from(text));
        assert_eq!(message("{\"data\":\"a\\nb\"}").expect("text"), "a\nb");
        assert_eq!(
            message("{\"data_base64\":\"/wA=\"}").expect("bytes"),
            &b"\xff\0"[..]
        );
        for bad in [
            "",
            "{}",
            "[]",
            "[\"x\",null]",
            "{\"data\":\"\",\"data_base64\":\"\"}",
            "{\"data\":\"x\",\"key\":\"k\"}",
            "{\"data_base64\":\"?\"}",
        ] {
            assert_eq!(message(bad).expect_err(bad).kind(), Kind::InvalidInput);
        }
    }

    #[test]
    fn events_never_break_in_the_middle() {
        assert_eq!(
            put(Format::Events, b"a\n\nb"),
            "id: 1-5\ndata: a\ndata: \ndata: b\n\n"
        );
        assert_eq!(put(Format::Events, b""), "id: 1-5\ndata: \n\n");
        let odd = put(Format::Events, b"a\rb");
        assert!(odd.starts_with("id: 1-5\nevent: json\ndata: {") && odd.ends_with("}\n\n"));
    }

    #[test]
    fn the_query_goes_before_the_headers() {
        let mut headers = HeaderMap::new();
        let of = |frame, headers: &HeaderMap| Format::of_pull(frame, headers).expect("known");
        assert_eq!(of(None, &headers), Format::Framed(Frame::Line));
        headers.insert(
            ACCEPT,
            "text/html, text/event-stream;q=0.9".parse().expect("value"),
        );
        assert_eq!(of(None, &headers), Format::Events);
        assert_eq!(of(Some("nul"), &headers), Format::Framed(Frame::Nul));
        assert!(Format::of_pull(Some("file"), &headers).is_err());
    }

    #[test]
    fn a_content_type_is_known_with_parameters_and_in_any_case() {
        let of = |sent: &str| PushFormat::of_push(None, Some(sent.as_bytes())).expect("known");
        for sent in [
            "application/x-ndjson",
            "Application/X-NDJSON ; charset=utf-8",
        ] {
            assert_eq!(of(sent), PushFormat::Json, "{sent}");
        }
        let len = "application/vnd.dnpipes.len;x=1";
        assert_eq!(of(len), PushFormat::Framed(Frame::Len));
        assert_eq!(of("application/x-ndjsonx"), PushFormat::Framed(Frame::Line));
    }
}
