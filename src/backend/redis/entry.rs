//! Entries of streams as messages, and their ids as positions.

use bytes::Bytes;
use redis::Value;

use crate::error::{Error, Kind, Result};
use crate::message::{Message, Position, time_from_micros};

/// An id, as `1526919030474-55`: milliseconds of the server's clock, and a number among those of the same one.
/// Both grow as positions do.
pub(super) fn position(id: &str) -> Result<Position> {
    id.parse().map_err(|_| strange(&format!("{id:?} is no id")))
}

/// What an answer is that no Redis gives.
pub(super) fn strange(what: &str) -> Error {
    Error::new(
        Kind::Io,
        format!("what answers there is no Redis as known: {what}"),
    )
}

/// A value that is text.
pub(super) fn text(value: &Value) -> Result<&str> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).map_err(|_| strange("no text")),
        Value::SimpleString(text) => Ok(text),
        _ => Err(strange("no text")),
    }
}

/// The entries of an answer to XRANGE.
pub(super) fn messages(value: Value) -> Result<Vec<Message>> {
    match value {
        Value::Array(entries) => entries.into_iter().map(message).collect(),
        Value::Nil => Ok(Vec::new()),
        _ => Err(strange("no entries")),
    }
}

/// The entries of an answer to XREAD of one stream.
pub(super) fn read(value: Value) -> Result<Vec<Message>> {
    match value {
        Value::Map(mut streams) if streams.len() == 1 => messages(streams.remove(0).1),
        Value::Nil => Ok(Vec::new()),
        _ => Err(strange("no streams")),
    }
}

fn message(entry: Value) -> Result<Message> {
    let Value::Array(parts) = entry else {
        return Err(strange("no entry"));
    };
    let [id, fields] = <[Value; 2]>::try_from(parts).map_err(|_| strange("no entry"))?;
    let position = position(text(&id)?)?;
    let fields = match fields {
        Value::Array(fields) => fields,
        // Deleted, and still waiting for a group's acknowledgement.
        Value::Nil => Vec::new(),
        _ => return Err(strange("no fields")),
    };
    Ok(Message {
        position,
        time: time_from_micros(position.epoch().saturating_mul(1000)),
        data: data(fields)?,
    })
}

/// The message of an entry: the value of its only field, whatever that is called; of several, one line of
/// JSON with all of them.
fn data(fields: Vec<Value>) -> Result<Bytes> {
    let mut values = fields.into_iter();
    if values.len() == 2 {
        return match values.nth(1) {
            Some(Value::BulkString(value)) => Ok(value.into()),
            _ => Err(strange("no value")),
        };
    }
    let mut object = String::from("{");
    while let (Some(name), Some(value)) = (values.next(), values.next()) {
        let (Value::BulkString(name), Value::BulkString(value)) = (name, value) else {
            return Err(strange("no value"));
        };
        if object.len() > 1 {
            object.push(',');
        }
        object += &quoted(&name);
        object.push(':');
        object += &quoted(&value);
    }
    object.push('}');
    Ok(object.into())
}

/// A string of JSON; what is no UTF-8 is replaced by U+FFFD.
fn quoted(bytes: &[u8]) -> String {
    serde_json::Value::from(String::from_utf8_lossy(bytes)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(fields: &[&str]) -> Value {
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let fields = fields.iter().map(|field| text(field)).collect();
        Value::Array(vec![text("1526919030474-55"), Value::Array(fields)])
    }

    #[test]
    fn one_field_is_the_message_and_several_are_json_in_their_order() {
        let shown = |fields: &[&str]| {
            let message = message(entry(fields)).expect("an entry");
            assert_eq!(message.position, Position::new(1526919030474, 55));
            String::from_utf8(message.data.to_vec()).expect("text")
        };
        assert_eq!(shown(&["anything", "a b"]), "a b");
        assert_eq!(
            shown(&["z", "1", "a", "say \"x\"\n"]),
            r#"{"z":"1","a":"say \"x\"\n"}"#
        );
    }

    #[test]
    fn what_is_no_entry_is_an_error() {
        for value in [
            Value::Nil,
            Value::Array(Vec::new()),
            Value::Array(vec![Value::Int(1), Value::Array(Vec::new())]),
        ] {
            assert_eq!(message(value).expect_err("none").kind(), Kind::Io);
        }
    }
}
