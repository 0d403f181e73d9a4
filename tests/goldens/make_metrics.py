"""Makes metrics/edges.json: scores of the official ptuning/main.py for texts that are easy to get wrong.

    pip install jieba==0.42.1 rouge-chinese==1.0.3 nltk && python tests/goldens/make_metrics.py

Each entry holds a prediction, a reference, jieba's words of both and the four scores as compute_metrics reports them.
"""

import json
import logging
import pathlib
import random

import jieba
import nltk
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

jieba.setLogLevel(logging.ERROR)

PAIRS = [
    # One, two, three characters: orders of BLEU without any n-gram.
    ("好", "好"),
    ("好", "不好"),
    ("很好", "很好"),
    ("很好", "好很"),
    ("不太好", "不太好"),
    ("甲", "乙"),
    # Lengths on both sides of the brevity penalty.
    ("今天天气很好", "今天天气很好。"),
    ("今天天气很好。", "今天天气很好"),
    ("今天", "今天天气很好，我们一起去公园散步，然后回家吃饭。"),
    ("今天天气很好，我们一起去公园散步，然后回家吃饭。", "今天"),
    # Repetition: BLEU clips, ROUGE counts once.
    ("好好好好好好", "好好学习"),
    ("的的的的的的的的", "我的书"),
    ("谢谢谢谢谢谢", "谢谢谢谢"),
    # Order: ROUGE-1 does not see it, ROUGE-L does.
    ("猫追狗", "狗追猫"),
    ("上海比北京大。", "北京比上海大。"),
    # Sentences, quotation marks, ellipses, dots.
    ("他说：“好。”我走了！真的？是的?", "他说：“好。”我走了。"),
    ("等等……再说", "等等……"),
    ("wait...... what", "wait...... what......"),
    ("a.......b", "a.b"),
    ("好。。。。", "好。"),
    ("？？？", "？"),
    ("。", "。"),
    # White space: lines, blank lines, tabs, wide blanks, separators.
    ("第一行\n第二行", "第一行 第二行"),
    ("第一行\n\n第三行", "第一行\n第三行"),
    ("第一行\r\n第二行", "第一行\n第二行"),
    ("  前面有空格", "前面有空格  "),
    ("\n\n换行开头", "换行开头\n\n"),
    ("全角\u3000空格", "全角 空格"),
    ("制表\t符", "制表 符"),
    ("句子。 \n \n 又一句。", "句子。又一句。"),
    ("单元\x1f分隔", "单元分隔"),
    # Numbers, units, names, mixed scripts.
    ("间隙为0.020-0.051mm，电压12.3V", "间隙为0.02-0.05mm，电压12.5V"),
    ("4.2.1节，CAN-BUS总线，AT&T公司", "4.2.1 CAN_BUS AT&T"),
    ("GPT-4和ChatGLM-6B都是大语言模型。", "ChatGLM-6B是一个语言模型"),
    ("增长了99.5%，也就是100%%", "增长99.5%"),
    ("The quick brown fox jumps over the lazy dog.", "The quick brown dog jumps over the lazy fox."),
    ("It's 3.14, isn't it?", "It is 3.14."),
    ("我在Google工作，email是a_b@c.com", "我在google工作，email是a-b@c.com"),
    ("日本語のテキスト、한국어", "日本語テキスト、한국어"),
    ("笑😀哭😭", "笑😀哭😂"),
    ("\u3400\u9fd6\U00020000生僻字", "生僻字\u9fd6"),
    ("１２３ＡＢＣ", "123ABC"),
    ("x²+y²=z²", "x^2+y^2=z^2"),
    # Words that jieba's model makes up, and those of its dictionary.
    ("他来到了网易杭研大厦", "他来到网易杭研大厦"),
    ("结婚的和尚未结婚的", "结婚的和没结婚的"),
    ("小明硕士毕业于中国科学院计算所", "小明毕业于中科院计算所"),
    ("B超检查，T恤，卡拉OK", "做B超，穿T恤，唱卡拉OK"),
    ("燃油泵_部件故障_漏油\n油箱_部件故障_渗油", "燃油泵_部件故障_漏油"),
]


def seeded(count):
    """Random pairs that share some of their words."""
    rng = random.Random(20230614)
    words = sorted(word for word, times in jieba.dt.FREQ.items() if times > 50)
    marks = ["，", "。", "！", "？", " ", "\n", "3.5", "A-1", "，", "。"]
    for _ in range(count):
        pool = rng.sample(words, 6) + rng.sample(marks, 3)
        yield tuple("".join(rng.choice(pool) for _ in range(rng.randint(1, 14))) for _ in range(2))


def scores(prediction, reference):
    """compute_metrics of the official script for one row, without its averages."""
    hypothesis, truth = " ".join(jieba.cut(prediction)), " ".join(jieba.cut(reference))
    rouge = Rouge().get_scores(hypothesis, truth)[0]
    result = {name: round(value["f"] * 100, 4) for name, value in rouge.items()}
    bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=SmoothingFunction().method3)
    result["bleu-4"] = round(bleu * 100, 4)
    return result


def main():
    jieba.initialize()
    pairs = PAIRS + [pair for pair in seeded(80) if all(text.strip() for text in pair)]
    out = {
        "versions": {"jieba": jieba.__version__, "rouge_chinese": "1.0.3", "nltk": nltk.__version__},
        "pairs": [
            {
                "prediction": prediction,
                "reference": reference,
                "jieba_prediction": list(jieba.cut(prediction)),
                "jieba_reference": list(jieba.cut(reference)),
                "scores": scores(prediction, reference),
            }
            for prediction, reference in pairs
        ],
    }
    folder = pathlib.Path(__file__).parent / "metrics"
    folder.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(pair, ensure_ascii=False) for pair in out.pop("pairs"))
    text = json.dumps(out)[:-1] + ', "pairs": [\n' + lines + "\n]}\n"
    (folder / "edges.json").write_text(text, encoding="utf-8")


main()
