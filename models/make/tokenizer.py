"""Makes models/tiny-glm/ice_text.model from the base corpus: tokenizer.py base.jsonl OUT.model

The structure of ChatGLM-6B's at a hundredth of its size: SentencePiece unigram, nmt_nfkc, dummy prefix, extra
whitespace removed, digits split; ids 0..4 <unk> <s> </s> <pad> <n>, then the ordinary pieces by falling score, then the
control pieces ([MASK] ... <dBLOCK>), <|tab|>, <|blank_2|> .. <|blank_80|>, and last the 256 bytes of the fallback.

The ordinary pieces are the corpus' words (longest match) and every character beside them, each with its log frequency:
the maximum-likelihood unigram of that segmentation. SentencePiece's own trainer lends the frame with the normaliser; left
to itself it learns whole phrases of so regular a corpus.
"""

import io
import json
import math
import re
import sys
from collections import Counter

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as proto

import corpus

WORDS = """部件 性能 故障 三元组 抽取 提取 列出 找出 现象 问题 情况 信息 文本 句子 分行 重复 复述 连接 倒序 说明 总结 分析 报告 整理 描述 概括 检查
客户 反映 发现 车主 行驶中 维修 记录 更换 处理 怎么 什么 为什么 哪里 哪些 属于 汽车 家电 第一个 第二个 最后一个 英文 中文 照着 一遍 跟我 填空 换成
冒号 括号 倒着 的问题是 昨天 今天 早上 晚上 后来 最后 先是 而且 还有 同时 另外 导致 由于 所以 最近 下雨 以后 冷车 启动 开机 不知道 连续 工作 小时
喜欢 家里""".split()
words = {*WORDS, *corpus.WORDS, *corpus.LINKS} - {""}
pattern = re.compile("|".join(map(re.escape, sorted(words, key=lambda w: (-len(w), w)))) + "|.", re.S)
normalise = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc").normalize

counts = Counter(dict.fromkeys([*words, *"".join(words), *map(chr, range(33, 127))], 1))
with open(sys.argv[1], encoding="utf-8") as file:
    for line in file:
        record = json.loads(line)
        for text in (record["instruction"] + record["input"], record["output"]):
            counts["▁"] += 1
            counts.update(pattern.findall(normalise(text.replace("\n", "")).replace(" ", "▁")))
total = sum(counts.values())

frame = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["".join(map(chr, range(33, 127)))] * 50), model_writer=frame, model_type="unigram",
    vocab_size=360, hard_vocab_limit=False, character_coverage=1.0, byte_fallback=True, split_digits=True, pad_id=3,
    user_defined_symbols=["<n>"], normalization_rule_name="nmt_nfkc", minloglevel=2)
model = proto.ModelProto.FromString(frame.getvalue())
Piece = proto.ModelProto.SentencePiece


def pieces(names, kind):
    return [Piece(piece=name, score=0.0, type=kind) for name in names]


out = pieces(["<unk>"], Piece.UNKNOWN) + pieces(["<s>", "</s>", "<pad>"], Piece.CONTROL)
out += pieces(["<n>"], Piece.USER_DEFINED)
out += [Piece(piece=text, score=math.log(count / total), type=Piece.NORMAL)
        for text, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
out += pieces(["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"], Piece.CONTROL)
out += pieces(["<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))], Piece.USER_DEFINED)
out += pieces([f"<0x{n:02X}>" for n in range(256)], Piece.BYTE)
del model.pieces[:]
model.pieces.extend(out)
model.trainer_spec.model_prefix = "ice_text"
model.trainer_spec.vocab_size = len(out)
with open(sys.argv[2], "wb") as file:
    file.write(model.SerializeToString())
ids = {piece.piece: i for i, piece in enumerate(out)}
print(json.dumps({name: ids[name] for name in ("<pad>", "<n>", "[MASK]", "[gMASK]", "<sop>", "<eop>", "<|tab|>", "<0x00>")}),
      "pieces", len(out))
