//! Who is let in, and how.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::curl::{Curl, curl, get};
use crate::gateway::{Certificates, Gateway, text};

const TOKENS: &str = "\
# tokens of a test
everything-everything full
read-only-read-only read
push-only-push-only push app-
";

fn bearer(token: &str) -> String {
    format!("Authorization: Bearer {token}")
}

#[test]
fn each_token_may_do_what_it_is_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let tokens = folder.path().join("tokens");
    fs::write(&tokens, TOKENS).expect("the tokens");
    let gateway = Gateway::start("memory:", &["--token-file", &text(&tokens)]);
    let url = gateway.url();
    let code = |token: &str, args: &[&str]| {
        let header = bearer(token);
        curl(&[&["-H", &header], args].concat()).0
    };
    let pipe = |name: &str| format!("{url}v1/pipes/{name}/messages");
    for token in ["", "wrong-wrong-wrong-wrong", "everything-everythin"] {
        assert_eq!(code(token, &[&format!("{url}v1/pipes")]), 401, "{token}");
        assert_eq!(code(token, &["-d", "x", &pipe("t")]), 401);
        assert_eq!(code(token, &[&format!("{url}metrics")]), 401);
    }
    assert_eq!(curl(&[&format!("{url}healthz")]).0, 200);
    let (full, read, push) = (
        "everything-everything",
        "read-only-read-only",
        "push-only-push-only",
    );
    assert_eq!(code(full, &["-d", "x", &pipe("t")]), 200);
    assert_eq!(code(read, &[&pipe("t")]), 200);
    assert_eq!(code(read, &["-d", "x", &pipe("t")]), 403);
    assert_eq!(code(read, &["-X", "DELETE", &pipe("t")]), 403);
    assert_eq!(code(read, &[&format!("{url}metrics")]), 200);
    assert_eq!(code(push, &["-d", "x", &pipe("app-log")]), 200);
    assert_eq!(code(push, &["-d", "x", &pipe("t")]), 403);
    assert_eq!(code(push, &[&pipe("app-log")]), 403);
    assert_eq!(code(push, &["-X", "DELETE", &pipe("app-log")]), 403);
    assert_eq!(code(push, &[&format!("{url}metrics")]), 403);
    let listed = get(&format!("{url}v1/pipes"), &["-H", &bearer(push)]);
    assert!(
        listed.contains("app-log") && !listed.contains("\"t\""),
        "{listed}"
    );
    // Read again on SIGHUP; a bad file changes nothing.
    fs::write(&tokens, "another-another-another\n").expect("the tokens");
    gateway.signal(libc::SIGHUP);
    until("the new token", || {
        code("another-another-another", &[&pipe("t")]) == 200
    });
    assert_eq!(code(full, &[&pipe("t")]), 401);
    fs::write(&tokens, "short\n").expect("the tokens");
    gateway.signal(libc::SIGHUP);
    assert_eq!(code("another-another-another", &[&pipe("t")]), 200);
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(
            since.elapsed() < Duration::from_secs(20),
            "waited in vain for: {what}"
        );
    }
}

#[test]
fn an_address_that_others_reach_needs_a_word_about_who_may_come() {
    let output = Command::new(env!("CARGO_BIN_EXE_dnpipes"))
        .args(["serve", "memory:", "--listen", "0.0.0.0:0"])
        .stdin(Stdio::null())
        .output()
        .expect("dnpipes runs");
    assert_eq!(output.status.code(), Some(2));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        errors.contains("--token-file") && errors.contains("--insecure"),
        "{errors}"
    );
    Gateway::start_at("memory:", &["--insecure"], "0.0.0.0:0", &[]);
}

#[test]
fn a_client_without_a_certificate_of_the_authority_is_not_let_in() {
    let certificates = Certificates::new();
    let mut flags = certificates.flags();
    flags.extend(["--tls-client-ca".to_owned(), text(&certificates.ca())]);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let gateway = Gateway::start("memory:", &flags);
    let url = format!("{}v1/pipes", gateway.url());
    let path = |name: &str| text(&certificates.file(name));
    let (ca, cert, key) = (path("ca.pem"), path("client.pem"), path("client.key"));
    let own = ["--cacert", &ca, "--cert", &cert, "--key", &key];
    assert_eq!(get(&url, &own), "[]\n");
    assert_eq!(curl(&["--cacert", &ca, &url]).0, 0, "without a certificate");
    assert_eq!(curl(&[&url]).0, 0, "without trust");
    let others = Certificates::new();
    let stranger = [
        "--cert",
        &text(&others.file("client.pem")),
        "--key",
        &text(&others.file("client.key")),
    ];
    assert_eq!(
        curl(&[&["--cacert", &ca, &url], &stranger[..]].concat()).0,
        0
    );
    // Plain HTTP on that port harms nobody.
    assert_eq!(curl(&[&url.replace("https", "http")]).0, 0);
    assert_eq!(get(&url, &own), "[]\n");
    // The commands take both from the URL.
    let source = format!("{}?ca={ca}&cert={cert}&key={key}", gateway.url());
    let run = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dnpipes"));
        let output = command.args(args).env("DNPIPES_SOURCE", &source).output();
        output.expect("dnpipes runs")
    };
    assert!(run(&["push", "topic", "hello"]).status.success());
    assert_eq!(run(&["pull", "topic@snapshot"]).stdout, b"hello\n");
}

#[test]
fn a_new_certificate_is_taken_at_sighup_and_streams_go_on() {
    let certificates = Certificates::new();
    let flags = certificates.flags();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let gateway = Gateway::start("memory:", &flags);
    let messages = format!("{}v1/pipes/topic/messages", gateway.url());
    let ca = text(&certificates.ca());
    get(&messages, &["--cacert", &ca, "-d", "one"]);
    let mut follower = Curl::start(&["--cacert", &ca, &format!("{messages}?follow")]);
    assert_eq!(follower.line(), "one");
    let serial = || {
        let output = Command::new("curl")
            .args([
                "-sS",
                "--cacert",
                &ca,
                "-o",
                "/dev/null",
                "-w",
                "%{certs}",
                &messages,
            ])
            .output()
            .expect("curl runs");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let before = serial();
    certificates.issue("gateway");
    gateway.signal(libc::SIGHUP);
    until("the new certificate", || serial() != before);
    get(&messages, &["--cacert", &ca, "-d", "two"]);
    assert_eq!(follower.line(), "two");
    // Nonsense is left alone.
    fs::write(certificates.file("gateway.pem"), "nonsense").expect("the file");
    gateway.signal(libc::SIGHUP);
    get(&messages, &["--cacert", &ca, "-d", "three"]);
    assert_eq!(follower.line(), "three");
}

#[test]
fn a_secret_shows_neither_in_errors_nor_in_the_log_nor_among_the_processes() {
    let folder = tempfile::tempdir().expect("a folder");
    let tokens = folder.path().join("tokens");
    fs::write(&tokens, TOKENS).expect("the tokens");
    let gateway = Gateway::start("memory:", &["--token-file", &text(&tokens)]);
    let run = |token: &str, source: &str| {
        Command::new(env!("CARGO_BIN_EXE_dnpipes"))
            .args(["push", "topic", "x"])
            .env("DNPIPES_SOURCE", source)
            .env("DNPIPES_TOKEN", token)
            .env("DNPIPES_LOG", "trace")
            .output()
            .expect("dnpipes runs")
    };
    let output = run("everything-everything", gateway.url());
    assert!(output.status.success(), "{output:?}");
    let refused = run("s3cret-s3cret-s3cret", gateway.url());
    assert_eq!(refused.status.code(), Some(1));
    let with_secret = gateway.url().replace("//", "//u:s3cret-s3cret-s3cret@");
    let refused_too = run("", &with_secret);
    assert_eq!(refused_too.status.code(), Some(1));
    for output in [&output, &refused, &refused_too] {
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !said.contains("s3cret") && !said.contains("everything-"),
            "{said}"
        );
    }
    let process = fs::read(format!("/proc/{}/cmdline", gateway.pid())).expect("its arguments");
    assert!(!String::from_utf8_lossy(&process).contains("everything-"));
}

#[test]
fn one_connection_too_many_waits_until_there_is_room() {
    let gateway = Gateway::start("memory:", &["--max-connections", "2"]);
    let messages = format!("{}v1/pipes/topic/messages", gateway.url());
    get(&messages, &["-d", "one"]);
    let mut followers: Vec<Curl> = (0..2)
        .map(|_| Curl::start(&[&format!("{messages}?follow")]))
        .collect();
    for follower in &mut followers {
        assert_eq!(follower.line(), "one");
    }
    assert_eq!(curl(&["-m", "0.3", &messages]).0, 0, "there is no room");
    followers.pop();
    assert_eq!(get(&messages, &[]), "one\n");
}

#[test]
fn a_web_page_cannot_use_a_gateway_that_needs_no_token() {
    let push = |gateway: &Gateway, header: &str| {
        let messages = format!("{}v1/pipes/topic/messages", gateway.url());
        let pushed = curl(&["-d", "x", "-H", header, &messages]).0;
        let pulled = curl(&["-H", header, &messages]).0;
        (pushed, pulled)
    };
    let gateway = Gateway::start("memory:", &[]);
    for header in [
        "Origin: http://evil.example",
        "Sec-Fetch-Site: cross-site",
        "Host: evil.example:7070",
    ] {
        assert_eq!(push(&gateway, header), (403, 403), "{header}");
    }
    assert_eq!(push(&gateway, "Host: localhost:7070"), (200, 200));
    // Who says that everybody may come in means it.
    let gateway = Gateway::start("memory:", &["--insecure"]);
    assert_eq!(push(&gateway, "Origin: http://evil.example"), (200, 200));
}

#[test]
fn a_web_page_cannot_use_a_certificate_that_the_browser_has() {
    let certificates = Certificates::new();
    let mut flags = certificates.flags();
    flags.extend(["--tls-client-ca".to_owned(), text(&certificates.ca())]);
    let mut flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let path = |name: &str| text(&certificates.file(name));
    let (ca, cert, key) = (path("ca.pem"), path("client.pem"), path("client.key"));
    let own = ["--cacert", &ca, "--cert", &cert, "--key", &key];
    let pushed = |gateway: &Gateway, header: &str| {
        let messages = format!("{}v1/pipes/topic/messages", gateway.url());
        curl(&[&own, &["-d", "x", "-H", header, &messages][..]].concat()).0
    };
    let gateway = Gateway::start("memory:", &flags);
    assert_eq!(pushed(&gateway, "Origin: https://evil.example"), 403);
    assert_eq!(pushed(&gateway, "Sec-Fetch-Site: cross-site"), 403);
    // A page elsewhere cannot have the name of the gateway's certificate.
    assert_eq!(pushed(&gateway, "Host: pipes.example:7070"), 200);
    flags.push("--insecure");
    let gateway = Gateway::start("memory:", &flags);
    assert_eq!(pushed(&gateway, "Origin: https://evil.example"), 200);
}

#[test]
fn tokens_that_every_user_can_read_are_warned_of() {
    let folder = tempfile::tempdir().expect("a folder");
    let (tokens, log) = (folder.path().join("tokens"), folder.path().join("log"));
    fs::write(&tokens, TOKENS).expect("the tokens");
    let logging = ["sh", "-c", "exec \"$@\" 2> \"$0\"", &text(&log)];
    for (mode, warned) in [(0o644, true), (0o640, false), (0o600, false)] {
        fs::set_permissions(&tokens, Permissions::from_mode(mode)).expect("its mode");
        let flags = ["--token-file", &text(&tokens)];
        Gateway::start_at("memory:", &flags, "127.0.0.1:0", &logging);
        let log = fs::read_to_string(&log).expect("its log");
        assert_eq!(log.contains("every user"), warned, "{mode:o}: {log}");
    }
}

#[test]
fn what_no_further_try_helps_against_fails_at_once_and_says_why() {
    let certificates = Certificates::new();
    let flags = certificates.flags();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let plain = Gateway::start("memory:", &[]);
    let flags = [&flags, &["--insecure"][..]].concat();
    let secure = Gateway::start_at("memory:", &flags, "0.0.0.0:0", &[]);
    let others = Certificates::new();
    let (ca, wrong) = (text(&certificates.ca()), text(&others.ca()));
    let url = secure.url().replace("0.0.0.0", "127.0.0.1");
    for (source, why) in [
        (format!("{url}?ca={wrong}"), "no trust"),
        (
            format!("{}?ca={ca}", url.replace("127.0.0.1", "127.0.0.2")),
            "no trust",
        ),
        (url.replace("https", "http"), "is this an https port?"),
        (
            format!("{}?ca={ca}", plain.url().replace("http", "https")),
            "is this an http port?",
        ),
        (
            format!("{url}?ca={}", text(&certificates.file("gateway.key"))),
            "no certificate in it",
        ),
    ] {
        let since = Instant::now();
        let output = Command::new(env!("CARGO_BIN_EXE_dnpipes"))
            .args(["ls", "--source", &source])
            .output()
            .expect("dnpipes runs");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{source}");
        assert!(errors.contains(why), "{source}: {errors}");
        assert!(since.elapsed() < Duration::from_secs(10), "{source}");
    }
}
