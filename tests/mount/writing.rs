//! Writing is pushing: what ordinary programs' writes become.

use std::fs;

use crate::support::{DNPIPES, Mount, Store, finish};
use std::process::Command;

const SHELLS: [&str; 3] = ["bash", "dash", "busybox sh"];

/// Runs a script that must succeed without a word on standard error.
fn shell(mount: &Mount, shell: &str, script: &str) -> String {
    let output = mount.shell(shell, script);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && errors.is_empty(),
        "{shell}: {script}: {errors}"
    );
    String::from_utf8(output.stdout).expect("text")
}

/// Every shell's `>`, `>>` and `>|` opens with O_TRUNC or O_APPEND, and that never resets: each is a push.
#[test]
fn redirections_push_and_never_reset() {
    let (mount, scratch) = (Mount::memory(&[]), Store::new());
    let numbers: String = (0..2000).map(|n| format!("line {n}\n")).collect();
    let big = scratch.folder().join("big.log");
    fs::write(&big, &numbers).expect("a file");
    for (pipe, name) in ["a", "b", "c"].into_iter().zip(SHELLS) {
        let script = format!(
            "echo one > {pipe}
            printf 'two\\nthree' > {pipe}
            echo four >> {pipe}
            printf 'five' >> {pipe}
            set -C; echo six >| {pipe}; set +C
            : > {pipe}
            {{ echo seven; printf eight; }} > {pipe}
            cat '{0}' > {pipe}
            cat < '{0}' >> {pipe}",
            big.display()
        );
        shell(&mount, name, &script);
        let short = "one\ntwo\nthree\nfour\nfive\nsix\nseven\neight\n";
        let expected = format!("{short}{numbers}{numbers}");
        assert_eq!(mount.bytes(pipe), expected.as_bytes(), "{name}");
    }
}

/// What a program writes to a pipe is pushed after what is there, whether it truncates or appends.
#[test]
fn programs_push_what_they_write_and_reset_nothing() {
    let (mount, scratch) = (Mount::memory(&[]), Store::new());
    let file = scratch.folder().join("file");
    fs::write(&file, "x\ny\n").expect("a file");
    let programs = [
        "printf 'x\\ny\\n' | tee T > /dev/null",
        "printf 'x\\ny' | tee -a T > /dev/null",
        "busybox tee T < F > /dev/null",
        "cp F T",
        "busybox cp F T",
        "dd if=F of=T status=none",
        "dd if=F of=T bs=1 status=none",
        "dd if=F of=T oflag=append conv=notrunc status=none",
        "busybox dd if=F of=T bs=3 2> /dev/null",
        "busybox cat F > T",
        "busybox cat F | busybox cat >> T",
        "sed -n 'w T' F",
        "gawk '{ print > \"T\" }' F",
        "mawk '{ print >> \"T\" }' F",
        "sort F > T",
        "python3 -c \"open('T', 'w').write('x\\ny\\n')\"",
        "python3 -c \"open('T', 'a').write('x\\ny')\"",
        "python3 -c \"open('T', 'ab', 0).write(b'x\\ny')\"",
        "python3 -c \"print('x', 'y', sep='\\n', file=open('T', 'w'))\"",
        "python3 -c \"open('T', 'r+b', 0).write(b'x\\ny\\n')\"",
        "python3 -c \"open('T', 'w+b', 0).write(b'x\\ny\\n')\"",
        "python3 -c \"import os; os.write(os.open('T', os.O_WRONLY), b'x\\ny\\n')\"",
        "python3 -c \"import shutil; shutil.copyfile('F', 'T')\"",
        "exec 3<> T; printf 'x\\ny\\n' >&3",
    ];
    for (number, program) in programs.into_iter().enumerate() {
        let pipe = format!("p{number}");
        let program = program
            .replace('T', &pipe)
            .replace('F', file.to_str().expect("a path"));
        mount.out(&format!("echo before > {pipe}"));
        mount.out(&program);
        assert_eq!(mount.lines(&pipe), ["before", "x", "y"], "{program}");
        assert_eq!(mount.bytes(&pipe), b"before\nx\ny\n", "{program}");
    }
}

/// `truncate -s 0`, ftruncate(2) and truncate(2) to 0 reset; `sort -o` does that before it writes.
#[test]
fn truncation_to_zero_resets() {
    let (mount, store) = (Mount::memory(&[]), Store::new());
    let sqlite = Mount::new(&store.url(), &[]);
    let programs = [
        ("truncate -s 0 T", ""),
        ("busybox truncate -s 0 T", ""),
        ("truncate -s 0 T@follow", ""),
        ("python3 -c \"import os; os.truncate('T', 0)\"", ""),
        ("python3 -c \"open('T', 'r+b', 0).truncate(0)\"", ""),
        (
            "python3 -c \"import os; os.ftruncate(os.open('T', os.O_WRONLY), 0)\"",
            "",
        ),
        ("printf 'b\\na\\n' | sort -o T", "a\nb\n"),
    ];
    for mount in [&mount, &sqlite] {
        for (program, left) in programs {
            mount.out("printf '1\\n2\\n' > T");
            mount.out(program);
            assert_eq!(mount.out("cat T@snapshot"), left, "{program}");
            mount.out("truncate -s 0 T; echo again > T");
            assert_eq!(mount.out("cat T"), "again\n", "{program}");
            mount.out("truncate -s 0 T");
        }
    }
}

/// Truncation to any other size is EINVAL, fallocate is EOPNOTSUPP, and lseek, pread and pwrite are ESPIPE,
/// as on a pipe; none of them changes anything.
#[test]
fn what_a_pipe_cannot_do_is_refused() {
    let mount = Mount::memory(&[]);
    mount.out("printf '1\\n2\\n' > T");
    let said = mount.python(
        r#"
        fd = os.open('T', os.O_RDWR)
        print(why(os.truncate, 'T', 1), why(os.truncate, 'T', 1 << 40), why(os.ftruncate, fd, 4))
        print(why(os.lseek, fd, 0, os.SEEK_SET), why(os.lseek, fd, 0, os.SEEK_CUR), why(os.lseek, fd, 0, os.SEEK_END))
        print(why(os.pread, fd, 10, 0), why(os.pwrite, fd, b'no\n', 0), why(os.pwrite, fd, b'no\n', 4))
        print(why(os.preadv, fd, [bytearray(4)], 0), why(os.pwritev, fd, [b'no\n'], 0))
        print(why(os.posix_fallocate, fd, 0, 100) != 'ok')
        "#,
    );
    let expected =
        "EINVAL EINVAL EINVAL\nESPIPE ESPIPE ESPIPE\nESPIPE ESPIPE ESPIPE\nESPIPE ESPIPE\nTrue\n";
    assert_eq!(said, expected);
    let output = mount.sh("LC_ALL=C fallocate -l 100 T");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && errors.contains("not supported"),
        "{errors}"
    );
    assert_eq!(mount.lines("T"), ["1", "2"]);
}

/// dd's `seek=` truncates to a size, which is refused; it says so, resets nothing, and pushes.
#[test]
fn dd_with_seek_is_told_and_resets_nothing() {
    let (mount, scratch) = (Mount::memory(&[]), Store::new());
    let file = scratch.folder().join("file");
    fs::write(&file, "A\nB\n").expect("a file");
    mount.out("printf '1\\n2\\n' > T");
    let output = mount.sh(&format!(
        "LC_ALL=C dd if='{}' of=T bs=4 seek=1",
        file.display()
    ));
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        errors.contains("failed to truncate to 4 bytes") && errors.contains("Invalid argument"),
        "{errors}"
    );
    assert_eq!(mount.lines("T"), ["1", "2", "A", "B"]);
}

/// O_CREAT creates the pipe, and O_EXCL is refused where there is one; through a selector as well.
#[test]
fn open_creates_and_respects_o_excl() {
    let mount = Mount::memory(&[]);
    let said = mount.python(
        r#"
        new = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        os.write(os.open('T', new), b'one\n')
        print(why(os.open, 'T', new), why(os.open, 'T@nul', new))
        open('T', 'a').write('two\n')
        try:
            open('T', 'x')
        except FileExistsError:
            print('exists')
        os.write(os.open('U@nul', new), b'a\nb\0')
        print(why(os.open, 'missing', os.O_WRONLY))
        print(*sorted(os.listdir()))
        "#,
    );
    assert_eq!(said, "EEXIST EEXIST\nexists\nENOENT\nT U\n");
    assert_eq!(mount.lines("T"), ["one", "two"]);
    assert_eq!(mount.bytes("U@nul"), b"a\nb\0");
}

/// An unterminated last line is kept per writing process and pushed when that process closes the file, so a
/// child's close never cuts its parent's line.
#[test]
fn a_childs_close_does_not_cut_its_parents_line() {
    let mount = Mount::memory(&[]);
    for (pipe, name) in ["a", "b", "c"].into_iter().zip(SHELLS) {
        let script =
            format!("{{ printf par; (:); (exec true); /bin/true; printf 'ent\\n'; }} > {pipe}");
        shell(&mount, name, &script);
        assert_eq!(mount.lines(pipe), ["parent"], "{name}");
    }
    mount.python(
        r#"
        fd = os.open('T', os.O_WRONLY | os.O_CREAT)
        os.write(fd, b'par')
        for number in range(3):
            child = os.fork()
            if child == 0:
                if number:
                    os.write(fd, b'child %d' % number)
                os.close(fd)
                os._exit(0)
            os.waitpid(child, 0)
        os.write(fd, b'ent\n')
        os.write(fd, b'last')
        os.close(fd)
        "#,
    );
    assert_eq!(mount.lines("T"), ["child 1", "child 2", "parent", "last"]);
}

/// The line of a process that is killed is pushed too: its end closes the file.
#[test]
fn a_killed_writers_line_is_pushed() {
    let mount = Mount::memory(&[]);
    let output = mount.sh("exec 3> T; printf half >&3; kill -9 $$");
    assert!(!output.status.success());
    assert_eq!(mount.lines("T"), ["half"]);
}

/// A descriptor that was handed to another process stays open for writing: each pushes its own last line,
/// and the last close leaves none behind.
#[test]
fn a_descriptor_handed_on_pushes_each_process_line() {
    let mount = Mount::memory(&[]);
    mount.python(
        r#"
        import socket
        ours, theirs = socket.socketpair()
        child = os.fork()
        if child == 0:
            ours.close()
            _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
            os.write(fds[0], b'theirs')
            os._exit(0)
        theirs.close()
        fd = os.open('T', os.O_WRONLY | os.O_CREAT)
        os.write(fd, b'ours')
        socket.send_fds(ours, [b'x'], [fd])
        os.close(fd)
        os.waitpid(child, 0)
        # Nobody takes this one: the file is closed with the socket that it lies in.
        ours, theirs = socket.socketpair()
        fd = os.open('T', os.O_WRONLY)
        os.write(fd, b'in flight')
        socket.send_fds(ours, [b'x'], [fd])
        os.close(fd)
        ours.close()
        theirs.close()
        "#,
    );
    let mut lines = mount.lines("T");
    assert_eq!(lines.pop().as_deref(), Some("in flight"));
    lines.sort();
    assert_eq!(lines, ["ours", "theirs"]);
}

/// A message over the limit is EMSGSIZE at once, the log names the limit, and earlier messages of the same
/// write stay stored and are counted.
#[test]
fn a_message_over_the_limit_is_refused_and_earlier_ones_are_counted() {
    let mount = Mount::memory(&["--max-message-size", "10"]);
    let said = mount.python(
        r#"
        fd = os.open('T', os.O_WRONLY | os.O_CREAT)
        print(os.write(fd, b'0123456789\n'))
        print(why(os.write, fd, b'0123456789x\n'))
        print(os.write(fd, b'a\nb\n0123456789x\nc\n'))
        print(why(os.write, fd, b'0123456789x\nc\n'))
        print(os.write(fd, b'a\n'))
        print(os.write(fd, b'01234'), why(os.write, fd, b'56789x\n'))
        print(os.write(fd, b'0123456789'))
        os.close(fd)
        "#,
    );
    assert_eq!(said, "11\nEMSGSIZE\n4\nEMSGSIZE\n2\n5 EMSGSIZE\n10\n");
    let expected = ["0123456789", "a", "b", "a", "0123456789"];
    assert_eq!(mount.lines("T"), expected);
    let log = mount.log();
    let told = log.lines().filter(|line| line.contains("limit of 10"));
    assert_eq!(told.count(), 3, "{log}");
}

/// A message over the limit is EMSGSIZE in every framing, and one at the limit is taken.
#[test]
fn the_limit_holds_in_every_framing() {
    let mount = Mount::memory(&["--max-message-size", "5"]);
    let said = mount.python(
        r#"
        for frame, at, over in [
            ('nul', b'12345\0', b'123456\0'),
            ('file', b'12345', b'123456'),
            ('len', b'\0\0\0\x0512345', b'\0\0\0\x06123456'),
        ]:
            for data in at, over:
                fd = os.open('T@' + frame, os.O_WRONLY | os.O_CREAT)
                print(why(os.write, fd, data))
                os.close(fd)
        "#,
    );
    assert_eq!(said, "ok\nEMSGSIZE\nok\nEMSGSIZE\nok\nEMSGSIZE\n");
    assert_eq!(mount.lines("T"), ["12345", "12345", "12345"]);
}

/// One write(2) that reaches the limit in a later request is cut short where the kernel has to, the rest is
/// EMSGSIZE, and the writer goes on afterwards.
#[test]
fn a_write_of_several_requests_reaches_the_limit() {
    let mount = Mount::memory(&["--max-message-size", "1500KiB"]);
    let said = mount.python(
        r#"
        data = b'a\n' + b'x' * (3 << 20) + b'\nz\n'
        fd = os.open('T', os.O_WRONLY | os.O_CREAT)
        taken = os.write(fd, data)
        print(2 <= taken < len(data), why(os.write, fd, data[taken:]), os.write(fd, b'b\n'))
        "#,
    );
    assert_eq!(said, "True EMSGSIZE 2\n");
    assert_eq!(mount.lines("T"), ["a", "b"]);
}

/// A line over the limit that a program writes in many pieces gives it an error and pushes no fragment.
#[test]
fn an_endless_line_pushes_no_fragment() {
    let mount = Mount::memory(&[]);
    mount.out("touch T");
    let output = mount.sh("LC_ALL=C; head -c 20M /dev/zero | tr '\\0' x | LC_ALL=C cat > T");
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && errors.contains("Message too long"),
        "{errors}"
    );
    assert_eq!(mount.bytes("T"), b"");
    assert!(mount.log().contains("limit of 16777216"), "{}", mount.log());
}

/// The shells' own `printf` and `echo` go on writing after an error; what they write of a line that is over
/// the limit still gives an error and pushes no fragment.
#[test]
fn a_shells_line_over_the_limit_pushes_no_fragment() {
    let mount = Mount::memory(&["--max-message-size", "10000"]);
    mount.out("touch T");
    let mut wrong = Vec::new();
    for shell in SHELLS {
        for length in [10_001, 12_000, 16_384, 20_000, 24_575, 24_576, 33_000] {
            for printer in ["echo", "printf '%s\\n'"] {
                let script = format!(
                    "line=$(head -c {length} /dev/zero | tr '\\0' x); {printer} \"$line\" > T"
                );
                let output = mount.shell(shell, &script);
                assert!(!output.status.success(), "{shell}: {printer} {length}");
                let pushed: Vec<usize> = mount.lines("T").iter().map(String::len).collect();
                if !pushed.is_empty() {
                    wrong.push(format!("{shell}: {printer} of {length}: {pushed:?}"));
                    mount.out("truncate -s 0 T");
                }
            }
        }
    }
    assert!(wrong.is_empty(), "fragments were pushed: {wrong:#?}");
}

/// Buffers that could not be written are written again at the close: that is no line of its own.
#[test]
fn a_buffers_line_over_the_limit_pushes_no_fragment() {
    let mount = Mount::memory(&["--max-message-size", "2MiB"]);
    for over in [1, 100, 5001, 100_000, 500_000] {
        for mode in ["w", "a"] {
            mount.out("truncate -s 0 T || touch T");
            let said = mount.python(&format!(
                r#"
                try:
                    with open('T', '{mode}') as file:
                        file.write('first\n' + 'z' * ((2 << 20) + {over}) + '\nnext\n')
                except OSError as error:
                    print(errno.errorcode[error.errno])
                "#
            ));
            assert_eq!(said, "EMSGSIZE\n", "{over} {mode}");
            let lines = mount.lines("T");
            let short = lines.iter().all(|line| line == "first" || line == "next");
            assert!(short && lines[0] == "first", "{over} {mode}: {lines:?}");
        }
    }
    let output = mount.sh(
        "LC_ALL=C awk 'BEGIN { for (i = 0; i < 2100000; i++) printf \"z\" > \"T2\"; print \"\" > \"T2\"; print \"next\" > \"T2\" }'",
    );
    let lines: Vec<usize> = mount.lines("T2").iter().map(String::len).collect();
    assert!(
        lines.iter().all(|length| *length == 4),
        "{lines:?} {output:?}"
    );
}

/// What is appended behind a line over the limit is pushed.
#[test]
fn a_line_behind_one_over_the_limit_is_pushed_also_by_appending() {
    let mount = Mount::memory(&["--max-message-size", "10"]);
    for into in [">", ">>"] {
        let script = format!("{{ echo a; echo 0123456789ABC; echo b; echo c; }} {into} T");
        let output = mount.sh(&script);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(mount.out("cat T; truncate -s 0 T"), "a\nb\nc\n", "{into}");
    }
}

/// `nul`: each NUL ends a message, by selector and by `--frame`; the last one may do without.
#[test]
fn the_nul_frame() {
    let (plain, nul) = (Mount::memory(&[]), Mount::memory(&["--frame", "nul"]));
    for (mount, pipe) in [(&plain, "T@nul"), (&nul, "T")] {
        mount.out(&format!("printf 'a\\nb\\0\\0c\\r' > {pipe}"));
        assert_eq!(mount.bytes(pipe), b"a\nb\0\0c\r\0");
        assert_eq!(mount.bytes("T@line"), b"a\nb\n\nc\r\n");
    }
    nul.out("printf 'd\\ne\\n' > T@line");
    assert_eq!(nul.bytes("T"), b"a\nb\0\0c\r\0d\0e\0");
}

/// `file`: everything between open and the writer's close is one message, byte for byte; a read returns one
/// message.
#[test]
fn the_file_frame_is_binary_safe() {
    let (plain, file) = (Mount::memory(&[]), Mount::memory(&["--frame", "file"]));
    let scratch = Store::new();
    let photo = scratch.folder().join("photo");
    let bytes: Vec<u8> = (0..300_000_u32).map(|n| (n ^ (n >> 8)) as u8).collect();
    fs::write(&photo, &bytes).expect("a file");
    let photo = photo.display();
    for (mount, pipe) in [(&plain, "T@file"), (&file, "T")] {
        mount.out(&format!("cp '{photo}' {pipe}"));
        assert_eq!(
            mount.out(&format!("sha256sum < {pipe}")),
            mount.out(&format!("sha256sum < '{photo}'"))
        );
        mount.out(&format!("cp {pipe} '{photo}.copy'"));
        assert_eq!(
            fs::read(format!("{photo}.copy")).expect("the copy"),
            bytes,
            "cp {pipe}"
        );
        mount.out(&format!(
            "printf 'a\\nb' > {pipe}; : > {pipe}; {{ echo c; echo d; }} > {pipe}"
        ));
        let said = mount.python(&format!(
            r#"
            fd = os.open('{pipe}', os.O_RDONLY)
            print([len(os.read(fd, 1 << 20)) for _ in range(4)])
            "#
        ));
        assert_eq!(said, "[300000, 3, 4, 0]\n");
    }
}

/// `len`: a 4-byte big-endian length, then the bytes; safe for any bytes both ways.
#[test]
fn the_len_frame_is_binary_safe() {
    let (plain, len) = (Mount::memory(&[]), Mount::memory(&["--frame", "len"]));
    for (mount, pipe) in [(&plain, "T@len"), (&len, "T")] {
        let said = mount.python(&format!(
            r#"
            import struct
            messages = [bytes(range(256)), b'', b'\n' * 70000, b'\0', b'\n']
            stream = b''.join(struct.pack('>I', len(message)) + message for message in messages)
            out = os.open('{pipe}', os.O_WRONLY | os.O_CREAT)
            for at in range(0, len(stream), 777):
                os.write(out, stream[at:at + 777])
            os.close(out)
            read = open('{pipe}', 'rb').read()
            print(read == stream)
            fd = os.open('T@file', os.O_RDONLY)
            print([os.read(fd, 1 << 20) for _ in range(4)] == [message for message in messages if message])
            cut = os.open('{pipe}', os.O_WRONLY)
            os.write(cut, stream[:100])
            print(why(os.close, cut))
            print(open('{pipe}', 'rb').read() == stream)
            "#
        ));
        assert_eq!(said, "True\nTrue\nEINVAL\nTrue\n");
    }
}

/// A FUSE write is not a message: a write of more than 1 MiB is pushed whole, in order, and so is a line that
/// spans several requests.
#[test]
fn a_write_of_several_requests() {
    let mount = Mount::memory(&[]);
    let said = mount.python(
        r#"
        lines = b''.join(b'%099d\n' % number for number in range(33000))
        long = b'y' * (3 << 20) + b'\n'
        fd = os.open('T', os.O_WRONLY | os.O_CREAT)
        print(os.write(fd, lines) == len(lines), os.write(fd, memoryview(b'#' + long)[1:]) == len(long))
        print(os.writev(fd, [b'%d\n' % number for number in range(700)]))
        read = open('T', 'rb').read()
        print(read == lines + long + b''.join(b'%d\n' % number for number in range(700)))
        "#,
    );
    assert_eq!(said, "True True\n2690\nTrue\n");
    assert_eq!(
        mount.out("getfattr --only-values -n user.dnpipes.count T"),
        "33701"
    );
}

/// An empty line is an empty message, and `\r` is kept.
#[test]
fn empty_lines_and_carriage_returns_are_kept() {
    let mount = Mount::memory(&[]);
    mount.out("echo > T; printf '\\n\\na\\r\\n\\r\\n' > T; printf '' > T");
    assert_eq!(mount.bytes("T"), b"\n\n\na\r\n\r\n");
    assert_eq!(
        mount.out("getfattr --only-values -n user.dnpipes.count T"),
        "5"
    );
}

/// On a read-only mount pushes, resets and new pipes are EROFS, and reading works.
#[test]
fn a_read_only_mount_refuses_to_change_anything() {
    let store = Store::new();
    store.out("dnpipes push T one");
    for flags in [&["--read-only"][..], &["-o", "ro"]] {
        let mount = Mount::new(&store.url(), flags);
        let said = mount.python(
            r#"
            print(why(os.open, 'T', os.O_WRONLY), why(os.open, 'T', os.O_RDWR))
            print(why(os.open, 'new', os.O_WRONLY | os.O_CREAT), why(os.truncate, 'T', 0))
            print(why(os.unlink, 'T'), why(os.mkfifo, 'new'))
            "#,
        );
        assert_eq!(said, "EROFS EROFS\nEROFS EROFS\nEROFS EROFS\n");
        assert_eq!(mount.out("cat T; ls"), "one\nT\n");
    }
}

/// A message is never interleaved with another writer's, and the messages of one write stay together.
#[test]
fn writers_do_not_interleave() {
    let store = Store::new();
    let url = format!("{}?durability=process", store.url());
    let mounts = [Mount::new(&url, &[]), Mount::new(&url, &[])];
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            mounts[writer % 2].spawn_python(&format!(
                r#"
        fd = os.open('T', os.O_WRONLY | os.O_CREAT)
        for batch in range(20):
            os.write(fd, b''.join(b'{writer} %d %d %s\n' % (batch, line, b'x' * (line * 97)) for line in range(50)))
                "#
            ))
        })
        .collect();
    for writer in writers {
        let output = writer.finish();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let lines = mounts[0].lines("T");
    assert_eq!(lines.len(), 4 * 20 * 50);
    let mut batches = [0; 4];
    for batch in lines.chunks(50) {
        let writer: usize = batch[0][..1].parse().expect("a writer");
        for (number, line) in batch.iter().enumerate() {
            let filling = "x".repeat(number * 97);
            assert_eq!(
                *line,
                format!("{writer} {} {number} {filling}", batches[writer])
            );
        }
        batches[writer] += 1;
    }
    assert_eq!(mounts[1].lines("T"), lines);
}

/// An unknown option, frame or size is a usage error.
#[test]
fn a_mount_with_bad_options_does_not_start() {
    for flags in [
        ["--frame", "xml"],
        ["--max-message-size", "0"],
        ["-o", "bogus"],
        ["-o", "uid=root"],
    ] {
        let mut command = Command::new(DNPIPES);
        let output = finish(
            command
                .arg("mount")
                .args(flags)
                .args(["memory:", "/nowhere"]),
        );
        assert_eq!(output.status.code(), Some(2), "{flags:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty());
    }
}

/// What large messages need is given back once they are stored, or read.
#[test]
fn large_messages_leave_little_memory_behind() {
    let store = Store::new();
    let mount = Mount::new(&store.fast_url(), &[]);
    mount.out(
        "for each in 1 2 3 4; do
            head -c 16M /dev/zero | dd of=topic@file bs=1M iflag=fullblock status=none &
        done
        wait
        for each in 1 2 3 4; do
            cat topic@snapshot,file > /dev/null &
        done
        wait",
    );
    let kept = mount.kib_of("VmRSS");
    assert!(kept < 64 << 10, "{kept} KiB");
}
